"""What operators read of a cut-over, and what programs read instead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from inferfleet.cutover.asking import Weights
from inferfleet.cutover.orders import Outcome
from inferfleet.cutover.state import At, Model, shares
from inferfleet.report import counted

_LATENCIES = {"first_token": "first token", "seconds": "whole answer"}
_SIDES = (("clients", "p50"), ("clients", "p95"), ("copies", "p50"), ("copies", "p95"))


def show(out: Console, outcome: Outcome, phase: str) -> None:
    """Models that can move: weights, requests and shadow; then what is not as it should be."""
    since = min((w["began"] for _, workers in outcome.found for w in workers), default=0.0)
    movable = [model for model in outcome.models if len(model.inventory) > 1]
    if outcome.found and not movable:
        out.print("One pool for each model: there is nothing to move between.")
    for model in movable:
        out.print(f"[bold]{escape(model.name)}[/]: the inventory says {said(model.inventory)}")
        out.print(_gateways(model, since))
        for shadow in model.shadows:
            _show_shadow(out, shadow)
    for warning in warnings(outcome, phase):
        out.print(f"[yellow]{escape(warning)}[/]")


def show_failures(out: Console, outcome: Outcome) -> None:
    """Which gateways failed and what that means for the others."""
    for host, why in outcome.failed.items():
        out.print(f"[bold]{host}[/]: [bold red]failed[/] {escape(why)}")
    stuck = {host: why for host, why in outcome.undone.items() if why}
    for host, why in stuck.items():
        out.print(f"[bold]{host}[/]: [bold red]may not be as it was[/]: {escape(why)}")
    if outcome.undone and not stuck:
        out.print(f"{counted(len(outcome.undone), 'gateway')}: as before.")


def warnings(outcome: Outcome, phase: str) -> Iterator[str]:
    """What lasts until somebody ends it, in whole sentences."""
    for model in outcome.models:
        if model.differing:
            yield f"{model.name}: the gateways differ: {', '.join(model.differing)}"
        if model.behind:
            yield (
                f"{model.name}: another configuration than the inventory's at "
                f"{', '.join(model.behind)}: inferfleet provision --phase {phase}"
            )
        if model.overridden:
            yield (
                f"{model.name}: set by hand at {', '.join(model.overridden)}. To stay, write it to "
                f"the inventory; to go back: inferfleet cutover --phase {phase} --back"
            )


def reminders(found: Mapping[str, Mapping[str, Weights]]) -> Iterator[str]:
    """For a plan: what was set by hand and outlives it, by gateway and model."""
    for host, models in found.items():
        for model, weights in models.items():
            yield f"{host}: {model} by hand: {said(weights)} (cutover --back ends it)"


def said(weights: Mapping[str, float]) -> str:
    """Weights as shares; pools without any are told too."""
    found = shares(weights)
    return ", ".join(f"{pool} {found.get(pool, 0.0) * 100:.4g} %" for pool in weights)


def _gateways(model: Model, since: float) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
    for heading in ("  gateway", "in force", f"requests since {began}", "failed"):
        table.add_column(heading)
    for at in model.at:
        pools = [pool for pool in at.configured if pool in at.requests]
        counts = [f"{pool} {at.requests[pool]['requests']:,}" for pool in pools]
        failed = sum(own["failed"] for own in at.requests.values())
        table.add_row(
            f"  {at.host}", _in_force(at, model), ", ".join(counts) or "none", f"{failed:,}"
        )
    for host in model.lacking:
        table.add_row(f"  {host}", "[yellow]does not know it yet[/]", "", "")
    return table


def _in_force(at: At, model: Model) -> str:
    every = dict.fromkeys(map(said, at.in_force))
    mark = " [yellow](by hand)[/]" if at.overridden else ""
    if at.host in model.differing:
        mark += " [bold yellow](differs)[/]"
    return " | ".join(every) + mark


def _show_shadow(out: Console, shadow: Mapping[str, Any]) -> None:
    percent = " to ".join(f"{share:g}" for share in shadow["percent"])
    failed = f"{shadow['failed']:,} failed"
    if shadow["failures"]:
        failed += f" (last: {'; '.join(shadow['failures'])})"
    out.print(
        f"  shadow: {percent} % also asked of {escape(shadow['pool'])}: {shadow['asked']:,} asked, "
        f"{escape(failed)}, {shadow['dropped']:,} dropped, {shadow['compared']:,} compared"
    )
    if not shadow["compared"]:
        return
    out.print(
        f"    same text {shadow['same_text']:.1%}, same end {shadow['same_end']:.1%}, same tools "
        f"{shadow['same_tools']:.1%}; medians: likeness {shadow['likeness_median']:.2f}, length "
        f"{shadow['length_median']:.2f}"
    )
    out.print(_latencies(shadow))


def _latencies(shadow: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("    seconds")
    for side, quantile in _SIDES:
        table.add_column(f"{side} {quantile}", justify="right")
    for key, name in _LATENCIES.items():
        cells = (f"{shadow[key][side][quantile]:.3f}" for side, quantile in _SIDES)
        table.add_row(f"    {name}", *cells)
    return table


def as_json(outcome: Outcome, phase: str) -> dict[str, Any]:
    """The same for programs; `ok` is whether all that was asked for is so."""
    return {
        "ok": fine(outcome),
        "phase": phase,
        "changed": outcome.changed,
        "models": {model.name: _details(model) for model in outcome.models},
        "failed": outcome.failed,
        "undone": outcome.undone,
        "warnings": list(warnings(outcome, phase)),
    }


def _details(model: Model) -> dict[str, Any]:
    return {
        "inventory": model.inventory,
        "gateways": {at.host: {**asdict(at), "overridden": at.overridden} for at in model.at},
        "overridden": model.overridden,
        "differing": model.differing,
        "behind": model.behind,
        "shadows": model.shadows,
    }


def fine(outcome: Outcome) -> bool:
    """Whether every gateway answered, and all do the same."""
    return not outcome.failed and not any(model.differing for model in outcome.models)
