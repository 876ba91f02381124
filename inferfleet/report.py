"""What people read on a terminal, and what programs read instead: one line per host, a summary."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from inferfleet.diff import unified
from inferfleet.model import Artefact, Diff, Result

_SIGNS = {"create": "+", "update": "~", "remove": "-", "ensure": "!", "pay": "!", "move": ">"}
_COLOURS = {"create": "green", "remove": "red", "ensure": "cyan", "pay": "cyan"}
_COLOURS |= {"update": "yellow", "move": "yellow"}
LONGEST = 40  # lines of a new file that a plan shows
LINE = 200  # characters of a line that a host's command printed
TITLE = 40  # characters of a title that stands before such a line on a terminal
QUIET_SECONDS = 10  # at least, between two such lines of a host in a file or pipe
_STATUS = {"unchanged": "dim", "changed": "green", "failed": "bold red", "skipped": "yellow"}


def console(*, stderr: bool = False) -> Console:
    """Colour on a terminal alone; lines are never cut or wrapped in a file."""
    stream = sys.stderr if stderr else sys.stdout
    wide = {} if stream.isatty() else {"width": 10_000}
    return Console(stderr=stderr, highlight=False, soft_wrap=True, **wide)  # type: ignore[arg-type]


def as_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, sort_keys=True, default=str))


def show_lock(out: Console, host: str, lock: str) -> None:
    """Who holds a host, if somebody does."""
    if lock:
        out.print(f"[bold]{host}[/]: [yellow]locked by {escape(lock)}[/]")


def show_diff(out: Console, found: Diff, artefacts: Iterable[Artefact], before: Any) -> None:
    """All that would change on one host: what, why, the lines, what restarts."""
    out.print(f"[bold]{found.host}[/]: {headline(found)}")
    by_path = {artefact.path: artefact for artefact in artefacts}
    if found.moves_from and found.changes[0].kind != "move":
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
    for why in found.refused:
        out.print(f"  [bold red]refused[/]: {escape(why)}")
    for path in found.unknown:
        out.print(f"  [yellow]? {path}[/]  (not compared: its secret cannot be resolved here)")


def _show_lines(out: Console, lines: Sequence[str]) -> None:
    body = lines[2:]  # the two file headers say what stands above already
    cut = len(body) > 2 * LONGEST and all(line[:1] in "+@" for line in body)  # a new file
    for line in body[:LONGEST] if cut else body:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
        out.print(Text("      " + line, style=style))
    if cut:
        out.print(f"      ... {len(body) - LONGEST} more lines; `render` writes all of them")


def headline(found: Diff) -> str:
    """`no changes`, or how many of each kind."""
    if not found:
        return "no changes"
    counts: dict[str, int] = {}
    words = {"create": "to create", "update": "to change", "remove": "to remove"}
    words |= {"ensure": "to do", "move": "to move"}
    for change in found.changes:
        word = words.get(change.kind, "to finish")
        counts[word] = counts.get(word, 0) + 1
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def counted(count: int, what: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def plan_summary(diffs: Sequence[Diff], failures: int) -> str:
    """The last line of a plan, and the only one when nothing waits."""
    waiting = [found for found in diffs if found]
    if not waiting and not failures:
        return _nothing(len(diffs))
    restarts = counted(sum(len(found.restarts) for found in waiting), "restart")
    said = f"{len(waiting)} of {counted(len(diffs) + failures, 'host')} would change, {restarts}"
    return f"{said}, {failures} failed." if failures else f"{said}."


def _nothing(hosts: int) -> str:
    return f"No changes: {counted(hosts, 'host')} as the inventory says."


def result_line(result: Result) -> str:
    """One host, one line, after its name."""
    style = _STATUS[result.status]
    said = f"[{style}]{result.status:<9}[/]"
    if result.status == "changed":
        said += f" {counted(result.changes, 'change')}, {counted(result.restarts, 'restart')}"
    if result.error:
        said += f" {escape(result.error)}"
    return f"{said} [dim]({result.seconds:.1f} s)[/]"


def show_results(out: Console, results: Sequence[Result]) -> None:
    """A line per host, then the sum."""
    width = max(len(result.host) for result in results)
    for result in results:
        out.print(f"{result.host:<{width}}  {result_line(result)}")
    counts = {status: sum(r.status == status for r in results) for status in _STATUS}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    out.print(f"{counted(len(results), 'host')}: {said}.")


def cut(text: str, longest: int) -> str:
    """At most so many characters of a text; an ellipsis tells that it went on."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


class Progress:
    """One live line per host on a terminal; on anything else, a line when a step begins.

    Of what a step's command prints, a terminal shows the last line; anything else gets one now and
    then, so that a long download is not silent.
    """

    def __init__(self, out: Console, hosts: Iterable[str]) -> None:
        self.out = out
        self.lines = dict.fromkeys(hosts, "waiting")
        self.spoke = dict.fromkeys(self.lines, 0.0)  # when a host's last line was printed
        self.quiet_seconds = max(QUIET_SECONDS, len(self.lines))  # a line a second from them all
        self.live = Live(
            console=out, transient=True, get_renderable=self._shown, refresh_per_second=4
        )

    def __enter__(self) -> Progress:
        if self.out.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.out.is_terminal:
            self.live.stop()

    def event(self, host: str, event: dict[str, Any]) -> None:
        """Show what a host does now; see `wire.events`."""
        if event["event"] == "output":
            self.output(host, event["title"], event["line"])
        elif said := _event_words(event):
            worth = event["event"] in ("ensure", "unit", "recovered")
            self.say(host, said, worth_a_line=worth and event.get("state") != "ok")

    def say(self, host: str, said: str, *, worth_a_line: bool = True) -> None:
        """Show what a host is at; only what is worth a line goes to a file or pipe."""
        self.lines[host] = said
        if worth_a_line:
            self._print(host, said)

    def output(self, host: str, title: str, line: str) -> None:
        """Show what a command of a host printed last."""
        self.lines[host] = f"{cut(title, TITLE)}: {cut(line, LINE)}"
        if time.monotonic() - self.spoke[host] >= self.quiet_seconds:
            self._print(host, f"{title}: {cut(line, LINE)}")

    def _print(self, host: str, said: str) -> None:
        if not self.out.is_terminal:
            self.spoke[host] = time.monotonic()
            self.out.print(f"{host}: {escape(said)}")

    def _shown(self) -> Group:
        width = max(map(len, self.lines), default=0)
        said = (f"{host:<{width}}  {said}" for host, said in list(self.lines.items()))
        return Group(*(Text(line, no_wrap=True, overflow="ellipsis") for line in said))


def _event_words(event: dict[str, Any]) -> str:
    kind, state = event["event"], event.get("state", "")
    if kind == "ensure":
        return f"{event['title']}{'' if state == 'ok' else f' ({state})'}"
    if kind == "unit":
        what = (
            event["verb"] if event["unit"] == event["verb"] else f"{event['verb']} {event['unit']}"
        )
        return f"{what}{'' if state == 'ok' else f' ({state})'}"
    words = {
        "recovered": f"{event.get('how')} a run that was cut short",
        "check": "checking the staged files",
        "stage": "writing files",
        "done": "done",
        "failed": "failed",
    }
    return words.get(kind, "")
