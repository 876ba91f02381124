"""What people read on a terminal, and what programs read instead: one line per host, a summary."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from inferfleet.diff import unified
from inferfleet.model import Artefact, Diff, Result

_SIGNS = {"create": "+", "update": "~", "remove": "-", "ensure": "!", "pay": "!", "": " "}
_COLOURS = {"create": "green", "update": "yellow", "remove": "red", "ensure": "cyan", "pay": "cyan"}
_STATUS = {"unchanged": "dim", "changed": "green", "failed": "bold red", "skipped": "yellow"}


def console(*, stderr: bool = False) -> Console:
    """Colour on a terminal alone; lines are never cut or wrapped in a file."""
    stream = sys.stderr if stderr else sys.stdout
    wide = {} if stream.isatty() else {"width": 10_000}
    return Console(stderr=stderr, highlight=False, soft_wrap=True, **wide)  # type: ignore[arg-type]


def as_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, default=str))


def show_diff(out: Console, found: Diff, artefacts: Iterable[Artefact], before: Any) -> None:
    """All that would change on one host: what, why, the lines, what restarts."""
    out.print(f"[bold]{found.host}[/]: {headline(found)}")
    by_path = {artefact.path: artefact for artefact in artefacts}
    if found.moves_from:
        out.print(f"  [bold yellow]leaves phase {found.moves_from}[/]: what only it had goes away")
    for change in found.changes:
        sign, colour = _SIGNS[change.kind], _COLOURS[change.kind]
        detail = f"  ({change.detail})" if change.detail else ""
        out.print(f"  [{colour}]{sign} {escape(change.subject)}[/]{escape(detail)}")
        if change.kind in ("create", "update") and change.subject in by_path and before is not None:
            _show_lines(out, unified(by_path[change.subject], before.get(change.subject)))
    for word, units in (
        ("stops", found.stops),
        ("restarts", found.restarts),
        ("reloads", found.reloads),
    ):
        if units:
            out.print(f"  [bold]{word}[/] {', '.join(units)}")
    for path in found.unknown:
        out.print(f"  [yellow]? {path}[/]  (not compared: its secret cannot be resolved here)")


def _show_lines(out: Console, lines: Sequence[str]) -> None:
    for line in lines[2:]:  # the two file headers say what stands above already
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        out.print(Text("      " + line, style=style))


def headline(found: Diff) -> str:
    """`no changes`, or how many of each kind."""
    if not found:
        return "no changes"
    counts: dict[str, int] = {}
    words = {"create": "to create", "update": "to change", "remove": "to remove", "ensure": "to do"}
    for change in found.changes:
        word = words.get(change.kind, "to finish")
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def plan_summary(diffs: Sequence[Diff], failures: int) -> str:
    """The last line of a plan."""
    waiting = [found for found in diffs if found]
    if not waiting and not failures:
        return f"No changes: all {len(diffs)} hosts are as the inventory says."
    restarts = sum(len(found.restarts) for found in waiting)
    said = f"{len(waiting)} of {len(diffs) + failures} hosts would change, {restarts} restarts"
    return f"{said}, {failures} not reached." if failures else f"{said}."


def result_line(result: Result) -> str:
    """One host, one line."""
    style = _STATUS[result.status]
    said = f"[{style}]{result.status:<9}[/]"
    if result.status == "changed":
        said += f" {result.changes} changes, {result.restarts} restarts"
    if result.error:
        said += f" {escape(result.error)}"
    return f"{said} [dim]({result.seconds:.1f} s)[/]"


def show_results(out: Console, results: Sequence[Result]) -> None:
    """A line per host, then the sum."""
    table = Table.grid(padding=(0, 2))
    for result in results:
        table.add_row(result.host, result_line(result))
    if not any(result.status != "unchanged" for result in results):
        out.print(f"No changes: all {len(results)} hosts are as the inventory says.")
    out.print(table)
    out.print(results_summary(results))


def results_summary(results: Sequence[Result]) -> str:
    """The last line of a push."""
    counts = {status: sum(r.status == status for r in results) for status in _STATUS}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(results)} hosts: {said}."


class Progress:
    """One live line per host on a terminal; on anything else, a line when a step begins."""

    def __init__(self, out: Console, hosts: Iterable[str]) -> None:
        self.out = out
        self.lines = dict.fromkeys(hosts, "waiting")
        self.live = Live(self._table(), console=out, transient=True, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self.out.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.out.is_terminal:
            self.live.stop()

    def event(self, host: str, event: dict[str, Any]) -> None:
        """Show what a host does now; see `wire.events`."""
        said = _event_words(event)
        if not said:
            return
        self.lines[host] = said
        if self.out.is_terminal:
            self.live.update(self._table(), refresh=True)
        elif event["event"] in ("ensure", "unit", "recovered") and event.get("state") != "ok":
            self.out.print(f"{host}: {escape(said)}")

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for host, said in self.lines.items():
            table.add_row(host, escape(said))
        return table


def _event_words(event: dict[str, Any]) -> str:
    kind, state = event["event"], event.get("state", "")
    if kind == "ensure":
        return f"{event['title']}{'' if state == 'ok' else f' ({state})'}"
    if kind == "unit":
        return f"{event['verb']} {event['unit']}{'' if state == 'ok' else f' ({state})'}"
    words = {
        "recovered": f"{event.get('how')} a run that was cut short",
        "check": "checking the staged files",
        "stage": "writing files",
        "done": "done",
        "failed": "failed",
    }
    return words.get(kind, "")
