"""Plots of a result as SVG, without a library: four panels over the number of requests at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from inferfleet.load.compare import METRICS, Metric
from inferfleet.load.outcome import Outcome, Side

WIDTH, HEIGHT = 860, 640
_LEFT, _TOP, _PANEL_W, _PANEL_H = 64, 64, 340, 200  # of a panel's plot area, pixels
_STEP_X, _STEP_Y = 430, 290
_DASHES = ("", "6 3", "2 3")  # p50, p95, p99
_PANELS = (
    ("output tokens/s", ("output_tokens_per_second",)),
    ("requests/s", ("requests_per_second",)),
    ("time to first token, ms", ("first_token_p50", "first_token_p95", "first_token_p99")),
    ("inter-token latency, ms", ("inter_token_p50", "inter_token_p95", "inter_token_p99")),
)
_STYLE = """\
.load{font:12px system-ui,sans-serif;
--ink:#1b1f24;--soft:#8a929b;--grid:#dfe3e8;--a:#0b62c4;--b:#c2410c}
@media(prefers-color-scheme:dark){.load{
--ink:#e8eaed;--soft:#9aa3ad;--grid:#39414b;--a:#6db3f8;--b:#fb9a5b}}
.load text{fill:var(--ink)}.load .soft{fill:var(--soft)}.load .title{font-weight:600}
.load .grid{stroke:var(--grid)}.load .bar{stroke:var(--soft)}
.load .s0{stroke:var(--a);fill:none;stroke-width:2}.load .d0{fill:var(--a)}
.load .s1{stroke:var(--b);fill:none;stroke-width:2}.load .d1{fill:var(--b)}
"""


@dataclass(frozen=True, slots=True)
class _Area:
    """One panel's plot area: where a step and a value are."""

    left: float
    top: float
    steps: Sequence[int]
    highest: float

    def x(self, concurrency: int) -> float:
        """Steps stand at equal distances: they usually double."""
        place = self.steps.index(concurrency)
        return self.left + _PANEL_W * (place + 0.5) / len(self.steps)

    def y(self, value: float) -> float:
        return self.top + _PANEL_H * (1 - value / self.highest)


def svg(found: Outcome) -> str:
    """The whole image; it follows the reader's light or dark scheme and needs no network."""
    steps = sorted({step.concurrency for side in found.sides for step in side.steps})
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="load" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="load by requests at once">',
        f"<style>{_STYLE}</style>",
        *_legend(found.sides),
    ]
    for number, (title, names) in enumerate(_PANELS):
        left, top = _LEFT + number % 2 * _STEP_X, _TOP + number // 2 * _STEP_Y
        metrics = [metric for metric in METRICS if metric.name in names]
        parts += _panel(found.sides, title, metrics, (left, top), steps)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(sides: Sequence[Side]) -> Iterator[str]:
    for number, side in enumerate(sides):
        x = _LEFT + number * 390
        yield f'<line class="s{number}" x1="{x}" x2="{x + 24}" y1="20" y2="20"/>'
        yield f'<text x="{x + 30}" y="24">{escape(f"{side.name}: {side.model}"[:60])}</text>'


def _panel(
    sides: Sequence[Side],
    title: str,
    metrics: Sequence[Metric],
    place: tuple[int, int],
    steps: Sequence[int],
) -> Iterator[str]:
    left, top = place
    values = [v for s in sides for m in metrics for step in s.steps if (v := m.of(step.rates))]
    area = _Area(left, top, steps, ceiling(max(values, default=1.0)))
    yield f'<text class="title" x="{left}" y="{top - 12}">{title}</text>'
    yield from _axes(area)
    for number, side in enumerate(sides):
        for line, metric in enumerate(metrics):
            yield from _series(area, side, metric, number, line if len(metrics) > 1 else 0)
    if len(metrics) > 1:
        yield from _dashes(left + _PANEL_W, top - 12)


def _axes(area: _Area) -> Iterator[str]:
    right, bottom = area.left + _PANEL_W, area.top + _PANEL_H
    for share in range(5):
        value = area.highest * share / 4
        y = area.y(value)
        yield f'<line class="grid" x1="{area.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield (
            f'<text class="soft" x="{area.left - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )
    for step in area.steps:
        yield (
            f'<text class="soft" x="{area.x(step):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{step}</text>"
        )
    yield (
        f'<text class="soft" x="{right}" y="{bottom + 32}" text-anchor="end">'
        "requests at once</text>"
    )


def _series(area: _Area, side: Side, metric: Metric, number: int, line: int) -> Iterator[str]:
    """A line through the steps; where there are repeats, a bar from the least to the greatest."""
    points = []
    for step in side.steps:
        value = metric.of(step.rates)
        if value is None:
            continue
        x, y = area.x(step.concurrency), area.y(value)
        points.append(f"{x:.1f},{y:.1f}")
        repeats = [v for rates in step.rounds if (v := metric.of(rates)) is not None]
        if len(repeats) > 1 and not line:
            ends = (area.y(min(repeats)), area.y(min(max(repeats), area.highest)))
            yield (
                f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{ends[0]:.1f}" '
                f'y2="{ends[1]:.1f}"/>'
            )
        said = f"{side.name} at {step.concurrency}: {metric.label} {value:.4g} {metric.unit}"
        yield (
            f'<circle class="d{number}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(said)}</title></circle>"
        )
    dash = f' stroke-dasharray="{_DASHES[line]}"' if line else ""
    yield f'<polyline class="s{number}" points="{" ".join(points)}"{dash}/>'


def _dashes(right: float, y: float) -> Iterator[str]:
    """Which line is which percentile."""
    for number, name in enumerate(("p50", "p95", "p99")):
        x = right - 150 + number * 52
        dash = f' stroke-dasharray="{_DASHES[number]}"' if number else ""
        yield f'<line class="bar" x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}"{dash}/>'
        yield f'<text class="soft" x="{x + 24}" y="{y}">{name}</text>'


def ceiling(value: float) -> float:
    """The next round number of 1, 2, 4 or 8 times a power of ten: a quarter of it is round, too."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value * 0.999)
