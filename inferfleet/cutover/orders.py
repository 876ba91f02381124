"""Other weights at all gateways or at none; the way back, wherever it can be gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from functools import partial

from inferfleet import push
from inferfleet.cutover import state
from inferfleet.cutover.asking import Order, Site, Weights, ask
from inferfleet.cutover.state import Workers
from inferfleet.errors import HostError
from inferfleet.transport import Options

Found = list[tuple[Site, Workers]]


@dataclass
class Outcome:
    """What became of it: `found` are gateways and what they say now; messages are by host.

    `undone` are those that were told to go back, with "" or why they perhaps did not.
    """

    found: Found = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    undone: dict[str, str] = field(default_factory=dict)
    changed: bool = False
    interrupted: bool = False

    @property
    def models(self) -> list[state.Model]:
        """What the gateways that answered say of each model."""
        return state.models(self.found)


def survey(sites: Sequence[Site], options: Options, *, shadow: bool = True) -> Outcome:
    """What all gateways say now."""
    return _each(sites, lambda site: ask(site, options, shadow=shadow))


def move(sites: Sequence[Site], options: Options, weights: Weights) -> Outcome:
    """Give the sites' one model these weights everywhere; where that fails at one, all go back."""
    (model,) = sites[0].models
    before = survey(sites, options, shadow=False)
    before.failed |= _refusals(before.found, model, weights)
    if before.failed or before.interrupted:
        return before
    outcome = _each(sites, partial(ask, options=options, orders=[Order(model, weights)]))
    if outcome.failed or outcome.interrupted:
        return _undone(before.found, options, model, outcome)
    outcome.changed = True
    return outcome


def back(sites: Sequence[Site], options: Options) -> Outcome:
    """The configuration's weights again, at every gateway that can be reached."""
    before = survey(sites, options, shadow=False)
    orders = {site.host.name: _ways_back(site, workers) for site, workers in before.found}
    left = [site for site, _ in before.found]
    outcome = _each(left, lambda site: ask(site, options, orders[site.host.name]))
    outcome.failed |= before.failed
    outcome.interrupted |= before.interrupted
    outcome.changed = any(at.overridden for model in before.models for at in model.at)
    return outcome


def _ways_back(site: Site, workers: Workers) -> list[Order]:
    return [Order(name, None) for name in site.models if name in workers[0]["models"]]


def _refusals(found: Found, model: str, weights: Weights) -> dict[str, str]:
    """Why gateways cannot take these weights, by host."""
    why = {}
    for site, workers in found:
        told = workers[0]["models"].get(model)
        if told is None or weights.keys() - told["configured"].keys():
            why[site.host.name] = f"it does not know all pools of '{model}' yet: provision it first"
        elif pools := state.unready(workers, weights):
            why[site.host.name] = f"no instance of {', '.join(pools)} can be asked there"
    return why


def _undone(before: Found, options: Options, model: str, outcome: Outcome) -> Outcome:
    """All gateways as they were, those that failed too: they may have followed in part."""
    former = {site.host.name: workers[0]["models"][model] for site, workers in before}

    def restore(site: Site) -> Workers:
        told = former[site.host.name]
        now = ask(site, options)
        if all(worker["models"][model]["weights"] == told["weights"] for worker in now):
            return now
        by_hand = told["weights"] != told["configured"]
        return ask(site, options, [Order(model, told["weights"] if by_hand else None)])

    went = _each([site for site, _ in before], restore)
    outcome.undone = dict.fromkeys(former, "") | went.failed
    outcome.found = went.found
    return outcome


def _each(sites: Sequence[Site], work: Callable[[Site], Workers]) -> Outcome:
    """The work at every gateway at once. Ctrl-C waits until all have ended, pressed twice not."""
    futures = push.begin(sites, work)
    outcome = Outcome()
    try:
        wait(futures)
    except KeyboardInterrupt:
        outcome.interrupted = True
        wait(futures)
    for future, site in futures.items():
        answer = future.result()
        if isinstance(answer, HostError):
            outcome.failed[site.host.name] = answer.message
        else:
            outcome.found.append((site, answer))
    return outcome
