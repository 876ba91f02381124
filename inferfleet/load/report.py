"""A result on a terminal: what will be done, how it goes, one line a step, what to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from inferfleet.load.compare import METRICS, Ratio
from inferfleet.load.outcome import Outcome
from inferfleet.load.statistics import Round, Step, Summary
from inferfleet.load.target import Target
from inferfleet.load.workload import Method
from inferfleet.report import counted

_MARKS = {"higher": "", "lower": "", "within noise": " ~", "unknown": " ?"}


def intent(targets: Sequence[Target], method: Method) -> Iterator[str]:
    """What will be sent where, before it is."""
    for target in targets:
        whose = f", with the key of {target.user}" if target.user else ""
        model = target.model or "the only model there is"
        yield f"{target.where}: {model}, {target.api}'s API{whose}"
    each = counted(method.requests, "request") if method.requests else f"{method.seconds:g} s"
    steps = ", ".join(map(str, method.concurrency))
    times = f", {method.repeats} times" if method.repeats > 1 else ""
    turns = " in turns" if len(targets) > 1 else ""
    asked = method.workload
    yield (
        f"{steps} requests at once, {each} each{times}{turns}; prompts of "
        f"{asked.prompt_tokens} tokens, answers of {asked.output_tokens}"
    )
    if not method.requests:
        rounds = len(targets) * len(method.concurrency) * method.repeats
        yield f"about {_lasting(rounds * method.seconds)}, and what the last answers take"


def _lasting(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


class Progress:
    """One live line on a terminal; nothing elsewhere."""

    def __init__(self, out: Console, targets: Sequence[Target], method: Method) -> None:
        self._out, self._targets, self._method = out, targets, method
        self._live = Live(Text(""), console=out, transient=True, auto_refresh=False)

    def __enter__(self) -> Progress:
        if self._out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._out.is_terminal:
            self._live.stop()

    def show(self, measured: Round | None, now: float) -> None:
        """The round that runs, at this time; None when it has ended."""
        if self._out.is_terminal and measured:
            self._live.update(Text(self._line(measured, now)), refresh=True)

    def _line(self, measured: Round, now: float) -> str:
        failed = sum(bool(sample.error) for sample in measured.samples)
        answers = counted(len(measured.samples) - failed, "answer")
        wrong = f", {failed} failed" if failed else ""
        passed = max(0.0, now - measured.begun)
        left = f"{max(0.0, self._method.seconds - passed):.0f} s left"
        if self._method.requests:
            left = f"{self._method.requests - len(measured.samples)} left"
        where = self._targets[measured.target].name
        return f"{where} at {measured.concurrency}: {answers}{wrong}, {left}"


def show(out: Console, found: Outcome) -> None:
    """The table, errors and warnings."""
    out.print(table(found))
    for side in found.sides:
        for kind, said in side.said.items():
            out.print(f"[red]{escape(side.name)}: {kind}[/]: {escape(said)}")
    if any(ratio.verdict == "within noise" for ratio in found.ratios):
        out.print("~ within the noise: the repeats of the two overlap")
    for warning in found.warnings:
        out.print(f"[yellow]warning[/]: {escape(warning)}")


def table(found: Outcome) -> Table:
    """One line per step; with two targets, a line of ratios after each pair."""
    head = ["at once", *(["target"] if len(found.sides) > 1 else []), *COLUMNS]
    shown = Table(box=None, pad_edge=False)
    for name in head:
        shown.add_column(name, justify="left" if name == "target" else "right", no_wrap=True)
    for row in rows(found):
        cells = [escape(cell) for cell in row]
        shown.add_row(*cells, style="bold" if len(row) > 1 and row[1] == RATIO else "")
    return shown


RATIO = "ratio"
COLUMNS = (
    "requests", "failed", "requests/s", "tokens/s",
    "first token ms p50", "p95", "p99", "inter-token ms p50", "p95", "p99", "client CPU",
)  # fmt: skip


def rows(found: Outcome) -> Iterator[list[str]]:
    """The table's cells; `ratio` stands where a target's name would."""
    several = len(found.sides) > 1
    for concurrency in sorted({s.concurrency for side in found.sides for s in side.steps}):
        for side in found.sides:
            for step in side.steps:
                if step.concurrency == concurrency:
                    yield [str(concurrency), *([side.name] if several else []), *cells(step)]
        own = {r.metric: r for r in found.ratios if r.concurrency == concurrency}
        if own:
            shown = [_ratio(own.get(metric.name)) for metric in METRICS]
            yield ["", RATIO, "", "", *shown, ""]


def cells(step: Step) -> list[str]:
    """One step, in the order of COLUMNS."""
    rates = step.rates
    return [
        str(step.requests),
        str(sum(step.errors.values())),
        f"{rates.requests_per_second:.2f}",
        f"{rates.output_tokens_per_second:.1f}",
        *_percentiles(rates.first_token),
        *_percentiles(rates.inter_token),
        f"{step.client_cpu:.0%}",
    ]


def _percentiles(found: Summary | None) -> list[str]:
    return [f"{1000 * v:.1f}" for v in (found.p50, found.p95, found.p99)] if found else ["-"] * 3


def _ratio(found: Ratio | None) -> str:
    return f"{found.ratio:.2f}{_MARKS[found.verdict]}" if found else "-"
