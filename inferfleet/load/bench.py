"""From the words of a command to a result: targets, method, the run, and what is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.markup import escape

from inferfleet.advice import whole
from inferfleet.errors import UsageError
from inferfleet.load import page, plot, report, saved
from inferfleet.load.outcome import Outcome, Side, outcome, side
from inferfleet.load.target import Target, of_phase, of_url
from inferfleet.load.workload import PATHS, Api, Method, Workload
from inferfleet.project import Project
from inferfleet.report import as_json as print_json
from inferfleet.report import console

if TYPE_CHECKING:
    from inferfleet.load.steps import Run

MOST = 256  # requests at once that a phase is put under; a URL takes what it is given
REPEATS = 3  # where two are compared; see `compare.ENOUGH`


@dataclass(frozen=True, slots=True)
class Place:
    """One target as the user names it: a phase or a URL, with what belongs to it."""

    where: str
    model: str = ""
    api: str = ""
    key: str = ""
    user: str = ""
    ca: str = ""

    @property
    def is_url(self) -> bool:
        return "://" in self.where

    def target(self, inventory: Path, *, rehearse: bool) -> Target:
        """Raises UsageError, InventoryError, SecretError."""
        if self.api not in ("", *PATHS):
            raise UsageError(f"--api is one of {', '.join(PATHS)}, not '{self.api}'")
        if self.is_url:
            if self.user:
                raise UsageError("--user is of a phase; a URL's key is --key env:NAME")
            api: Api = "ollama" if self.api == "ollama" else "openai"
            return of_url(self.where, self.model, api, self.key, self.ca)
        if self.key or self.api:
            raise UsageError("--key and --api are of a URL; a phase says both itself")
        project = Project(inventory)
        plan = project.plan(self.where, rehearse=rehearse)
        return of_phase(project, plan, self.model, self.user, self.ca)


def workload(prompt: str, output: str, shared: str, *, ignore_eos: bool) -> Workload:
    """Raises UsageError for words that are no numbers."""
    tokens = whole("prompt-tokens", prompt, 512)
    common = whole("shared-prefix", shared, 1) if shared else 0
    if common >= tokens:
        raise UsageError(f"--shared-prefix {common} leaves nothing of a prompt of {tokens} tokens")
    return Workload(tokens, whole("output-tokens", output, 128), common, ignore_eos, tokens)


def method(
    concurrency: str,
    seconds: str,
    requests: str,
    repeats: str,
    timeout: str,
    asked: Workload,
    *,
    compared: bool,
) -> Method:
    """Raises UsageError for words that are no numbers."""
    if seconds and requests:
        raise UsageError("--seconds and --requests exclude each other")
    parts = [part.strip() for part in concurrency.split(",") if part.strip()]
    steps = tuple(dict.fromkeys(whole("concurrency", part, 1) for part in parts))
    if not steps:
        raise UsageError("--concurrency is whole numbers with commas between, such as 1,4,16")
    return Method(
        asked,
        steps,
        seconds=float(whole("seconds", seconds, 20)),
        requests=whole("requests", requests, 1) if requests else 0,
        repeats=whole("repeats", repeats, REPEATS if compared else 1),
        timeout=float(whole("timeout", timeout, 300)),
    )


def run(
    places: list[Place], asked: Method, inventory: str, before: str, *, rehearse: bool, quiet: bool
) -> Outcome:
    """Say what will be done, do it, and sum up. Raises Error when a target does not answer."""
    if before and len(places) > 1:
        raise UsageError("--against and --before exclude each other")
    _limited(places, asked)
    earlier = _loaded(before)
    targets = [place.target(Path(inventory), rehearse=rehearse) for place in places]
    measured = _measured(targets, asked, quiet=quiet)
    sides = [side(target, n, measured.rounds) for n, target in enumerate(measured.targets)]
    return outcome(
        measured.method,
        [*([earlier[1]] if earlier else []), *sides],
        interrupted=measured.interrupted,
        before=earlier[0] if earlier else None,
    )


def _measured(targets: list[Target], asked: Method, *, quiet: bool) -> Run:
    out = console(stderr=True)
    out.quiet = quiet
    steps = _steps()
    for line in report.intent(targets, asked):
        out.print(escape(line))
    with report.Progress(out, targets, asked) as progress:
        found: Run = steps.measure(
            targets, asked, lambda shown: progress.show(shown, time.perf_counter())
        )
    return found


def _steps() -> ModuleType:
    try:
        from inferfleet.load import steps
    except ModuleNotFoundError as error:
        if error.name not in ("aiohttp", "uvloop"):
            raise
        raise UsageError(
            f"bench needs {error.name}, which is not here: pip install 'inferfleet[bench]'"
        ) from error
    return steps


def _limited(places: list[Place], asked: Method) -> None:
    """A phase serves people. Raises UsageError above the cap."""
    phases = [place.where for place in places if not place.is_url]
    if phases and max(asked.concurrency) > MOST:
        raise UsageError(
            f"--concurrency {max(asked.concurrency)}: a phase is put under {MOST} requests at "
            "once at most; give its address as --url where more is really meant"
        )


def show(found: Outcome, html: str, svg: str, *, as_json: bool) -> None:
    """Print the result, and write the page and the plot where they are wanted. Raises OSError."""
    if as_json:
        print_json(saved.document(found, ok=fine(found)))
    else:
        report.show(console(), found)
    for path, text in ((html, page.html), (svg, plot.svg)):
        if path:
            Path(path).write_text(text(found), encoding="utf-8")
            console(stderr=True).print(f"{escape(path)}: written")


def fine(found: Outcome) -> bool:
    """Every step of every target brought answers."""
    return all(each.steps for each in found.sides) and all(
        sum(step.errors.values()) < step.requests for each in found.sides for step in each.steps
    )


def _loaded(path: str) -> tuple[Method, Side] | None:
    """The saved run at `path`, if one is named. Raises UsageError, OSError."""
    if not path:
        return None
    asked, found = saved.load(Path(path))
    return asked, replace(found, name=f"before: {found.name}")
