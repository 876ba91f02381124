"""A result as one HTML page that needs nothing else: the plot, the table, the method. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from inferfleet import __version__
from inferfleet.load import report
from inferfleet.load.outcome import Outcome
from inferfleet.load.plot import svg

_STYLE = """\
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #8884}.ratio{font-weight:600}
svg{max-width:100%;height:auto}
"""


def html(found: Outcome) -> str:
    """The page."""
    title = "Load: " + " against ".join(side.name for side in found.sides)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *_list(f"{s.name}: {s.model} at {s.url} ({s.api}'s API)" for s in found.sides),
            svg(found),
            *_table(found),
            *_list([*_notes(found), *_said(found)]),
            "<h2>Method</h2>",
            *_list(_method(found)),
            "</body></html>",
            "",
        ]
    )


def _table(found: Outcome) -> Iterator[str]:
    head = ["at once", *(["target"] if len(found.sides) > 1 else []), *report.COLUMNS]
    yield "<div><table>"
    yield _row("th", head)
    for row in report.rows(found):
        yield _row("td", row, ratio=len(found.sides) > 1 and row[1] == report.RATIO)
    yield "</table></div>"


def _row(kind: str, row: Sequence[str], *, ratio: bool = False) -> str:
    cells = "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
    return f"<tr{' class=ratio' if ratio else ''}>{cells}</tr>"


def _notes(found: Outcome) -> Iterator[str]:
    if found.ratios:
        first, second = found.sides
        yield f"Ratios are {second.name} over {first.name}."
        yield "~: within the noise, the repeats of the two overlap. ?: too few repeats to tell."
    yield from (f"Warning: {warning}" for warning in found.warnings)


def _said(found: Outcome) -> Iterator[str]:
    for side in found.sides:
        yield from (f"{side.name}: {kind}: {said}" for kind, said in side.said.items())


def _method(found: Outcome) -> Iterator[str]:
    method, asked = found.method, found.method.workload
    yield f"inferfleet {__version__}, a closed loop: each client asks again once it is answered"
    each = f"{method.requests} requests" if method.requests else f"{method.seconds:g} s"
    yield f"each step {each}, {method.repeats} times, after a warm-up that is left out"
    yield f"prompts of {asked.prompt_tokens} tokens, {asked.shared_prefix} of them shared"
    forced = " (the end-of-text token was ignored)" if asked.ignore_eos else ""
    yield f"answers of at most {asked.output_tokens} tokens{forced}"
    if len(found.sides) > 1:
        yield "measured in turns" if found.interleaved else "the first is a saved run"
    yield "percentiles are exact: the nearest rank over all answers"


def _list(lines: Iterable[str]) -> Iterator[str]:
    yield "<ul>"
    yield from (f"<li>{escape(line)}</li>" for line in lines)
    yield "</ul>"
