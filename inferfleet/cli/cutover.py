"""The task that moves a model between pools of the gateways: cutover."""

from __future__ import annotations

import sys

from invoke.context import Context

from inferfleet.cli.command import (
    FINE,
    INTERRUPTED,
    INVENTORY,
    JSON,
    LIMIT,
    PHASE,
    PROBLEMS,
    REHEARSE,
    command,
    warn,
)
from inferfleet.cli.command import project as open_project
from inferfleet.errors import UsageError


@command(
    phase=PHASE,
    model="whose requests are moved, by name or alias (default: the only one; of --back all)",
    to="weights by deployment or provider, such as new=10,old=90; one name alone gets all",
    back="the weights of the inventory again, at every gateway that can be reached",
    inventory=INVENTORY,
    limit=f"{LIMIT}; gateways left out keep what they have",
    rehearse=REHEARSE,
    json=JSON,
)
def cutover(
    _: Context,
    phase: str = "",
    model: str = "",
    to: str = "",
    back: bool = False,
    inventory: str = "inventory",
    limit: str = "",
    rehearse: bool = False,
    json: bool = False,
) -> int:
    """Move a model from one pool to another, or look: weights, requests, the shadow's report."""
    from inferfleet import cutover as moving
    from inferfleet import report
    from inferfleet.cutover import showing, wanted

    if to and back:
        raise UsageError("say either --to or --back")
    project = open_project(inventory)
    plan = project.plan(phase, rehearse=rehearse)
    sites = moving.sites(plan, project.chosen(plan, limit))
    if not sites:
        raise UsageError(f"no host here is a gateway of phase '{phase}'")
    warn(project, quiet=json)
    if model or to:
        sites = [site.only(wanted.model(model, sites)) for site in sites]
    if to:
        outcome = moving.move(sites, project.options(), wanted.weights(to, sites[0]))
    else:
        outcome = (moving.back if back else moving.survey)(sites, project.options())
    if json:
        report.as_json(showing.as_json(outcome, phase))
    else:
        showing.show(report.console(), outcome, phase)
        showing.show_failures(report.console(stderr=True), outcome)
        if (to or back) and not (outcome.changed or outcome.undone):
            print("nothing was changed.", file=sys.stderr)
    if outcome.interrupted:
        return INTERRUPTED
    return FINE if showing.fine(outcome) else PROBLEMS
