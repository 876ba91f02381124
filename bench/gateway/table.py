"""Figures of several rounds and peers, as the tables that are printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Figures = dict[str, float]
NOISE = "waited_percent"

ROWS = {
    "requests_per_s": "requests/s, 32 at once",
    "p50_ms": "  p50, ms",
    "p99_ms": "  p99, ms",
    "added_ms": "  added median, 32 at once, ms",
    "added_alone_ms": "  added median, 1 at once, ms",
    "cpu_us_per_request": "  CPU per request, us",
    "waited_percent": "  waited for the core, % (noise)",
    **{
        f"{name}_{count}": title
        for count in (100, 500)
        for name, title in {
            "added_path_p50_ms": f"{count} streams: first chunk later, p50, ms",
            "added_path_p99_ms": "  p99, ms",
            "added_first_p50_ms": "  the same from the request on, p50, ms",
            "added_first_p99_ms": "  p99, ms",
            "added_chunk_p50_ms": "  any chunk later, p50, ms",
            "added_chunk_p99_ms": "  p99, ms",
            "cpu_s_per_1000_chunks": "  CPU per 1,000 chunks, s",
            "waited_percent": "  waited for the core, % (noise)",
            "streams_failed": "  streams failed",
            "streams_changed": "  streams whose bytes changed",
        }.items()
    },
    "mb_prompts_per_s": "1 MiB prompts/s, 8 at once",
    "mb_cpu_ms": "  CPU per prompt, ms",
    "waited_percent_mb": "  waited for the core, % (noise)",
    "mb_failed": "  failed",
    "resident_mb": "resident after the load, MB",
    "resident_most_mb": "  at most, MB",
    "left_before_first_ms": "client left before the first event: ms to stop",
    "left_mid_stream_ms": "  in mid stream, ms",
    "left_plain_ms": "  during a plain answer, ms",
    "retry_ms": "reset retried on another engine: extra ms",
    "retries": "  requests that were reset",
    "retry_failed": "  requests that failed",
    "retry_most_ms": "  at most, ms",
    "failed": "requests failed",
}


@dataclass(frozen=True, slots=True)
class Want:
    """A figure that must be at least, or at most, a limit; `ratio`: of LiteLLM's figure."""

    figure: str
    sense: Literal["at least", "at most"]
    limit: float
    ratio: bool = False
    title: str = ""

    def reached(self, value: float | None, other: float | None) -> bool | None:
        """None where it was not measured."""
        if value is None or (self.ratio and other is None):
            return None
        limit = self.limit * other if self.ratio and other is not None else self.limit
        return value >= limit if self.sense == "at least" else value <= limit


WANTED = (
    Want("requests_per_s", "at least", 30, ratio=True),
    Want("p99_over_p50", "at most", 2, title="p99 / p50, 32 at once"),
    Want("added_ms", "at most", 1 / 15, True, "added median, 32 at once, ms"),
    Want("added_alone_ms", "at most", 1 / 15, True, "added median, 1 at once, ms"),
    Want("added_path_p50_ms_100", "at most", 0.5, title="100 streams: first chunk later, p50, ms"),
    Want("added_path_p99_ms_100", "at most", 2, title="100 streams: first chunk later, p99, ms"),
    Want("added_path_p99_ms_500", "at most", 5, title="500 streams: first chunk later, p99, ms"),
    Want("cpu_s_per_1000_chunks_500", "at most", 0.035, title="500 streams: CPU s/1,000 chunks"),
    Want("streams_failed_100", "at most", 0, title="100 streams: failed"),
    Want("streams_failed_500", "at most", 0, title="500 streams: failed"),
    Want("streams_changed_500", "at most", 0, title="500 streams: bytes changed"),
    Want("resident_mb", "at most", 100),
    Want("mb_prompts_per_s", "at least", 900),
    Want("left_before_first_ms", "at most", 50, title="left before the first event: ms to stop"),
    Want("left_mid_stream_ms", "at most", 50, title="left in mid stream: ms to stop"),
    Want("left_plain_ms", "at most", 50, title="left during a plain answer: ms to stop"),
    Want("retry_ms", "at most", 5),
    Want("failed", "at most", 0),
)


def quietest(rounds: Sequence[Figures]) -> Figures:
    """The round in which it waited least for its core; what others did then disturbed it least."""
    return min(rounds, key=lambda found: sum(v for k, v in found.items() if k.startswith(NOISE)))


def summary(rounds: Sequence[dict[str, Figures]]) -> Figures:
    """The figures of each part, of the quietest round that has it, and what follows from two."""
    parts = dict.fromkeys(part for each in rounds for part in each)
    found: Figures = {}
    for part in parts:
        found |= quietest([each[part] for each in rounds if part in each])
    if found.get("p50_ms"):
        found["p99_over_p50"] = found["p99_ms"] / found["p50_ms"]
    return found


def number(value: float | None) -> str:
    """Three digits that matter; a dash where nothing was measured."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "never"
    if value == 0 or abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:#.3g}" if abs(value) >= 0.001 else f"{value:.4f}"


def peers(by_peer: dict[str, Figures]) -> str:
    """All that was measured, a column for each peer."""
    widths = [max(10, len(name) + 2) for name in by_peer]
    lines = [" " * 48 + "".join(f"{n:>{w}}" for n, w in zip(by_peer, widths, strict=True))]
    for figure, title in ROWS.items():
        values = [found.get(figure) for found in by_peer.values()]
        if any(value is not None for value in values):
            cells = (f"{number(v):>{w}}" for v, w in zip(values, widths, strict=True))
            lines.append(f"{title:<48}" + "".join(cells))
    return "\n".join(lines)


def verdicts(mine: Figures, litellm: Figures) -> str:
    """What was wanted of the gateway, and whether it reached that."""
    form = "{:<46}{:>10}{:>12}{:>20}  {}"
    lines = [form.format("", "measured", "of LiteLLM", "wanted", "reached")]
    for want in WANTED:
        value, other = mine.get(want.figure), litellm.get(want.figure)
        reached = want.reached(value, other)
        if reached is None and value is None:
            continue
        cells = (want.title or ROWS[want.figure], number(value), share(value, other))
        said = {None: "?", True: "yes", False: "NO"}[reached]
        lines.append(form.format(*cells, wish(want), said))
    return "\n".join(lines)


def share(value: float | None, other: float | None) -> str:
    """How many times the other's figure, or which part of it."""
    if value is None or other is None or not other or math.isinf(value):
        return "-"
    ratio = value / other
    if ratio >= 1 or ratio == 0:
        return f"{number(ratio)} x"
    return f"1/{number(1 / ratio)}"


def wish(want: Want) -> str:
    """`at most 1/15 of it`, `at least 30 x`, `at most 0.5`."""
    if not want.ratio:
        return f"{want.sense} {want.limit:g}"
    part = f"{want.limit:g} x" if want.limit >= 1 else f"1/{1 / want.limit:g}"
    return f"{want.sense} {part}"
