"""A result as JSON, and back: what `--json` prints is what `--before` reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferfleet import __version__
from inferfleet.errors import UsageError
from inferfleet.load.outcome import Outcome, Side
from inferfleet.load.statistics import Rates, Step, Summary
from inferfleet.load.workload import Method, Workload

FORMAT = 1


def document(found: Outcome, *, ok: bool) -> dict[str, Any]:
    """All of an outcome. Times are seconds; ratios are the second target's over the first's."""
    return {
        "ok": ok,
        "format": FORMAT,
        "version": __version__,
        "interleaved": found.interleaved,
        "interrupted": found.interrupted,
        "method": asdict(found.method),
        "targets": [asdict(side) for side in found.sides],
        "ratios": [asdict(ratio) for ratio in found.ratios],
        "warnings": list(found.warnings),
    }


def load(path: Path) -> tuple[Method, Side]:
    """The method of a saved run, and its target; of two, the last. Raises UsageError, OSError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UsageError(f"{path}: made by another inferfleet, {found.get('version')}")
        return _method(found["method"]), _side(found["targets"][-1])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"{path}: no saved run of `inferfleet bench --json`") from error


def _method(found: dict[str, Any]) -> Method:
    concurrency = tuple(found["concurrency"])
    return Method(
        **{**found, "workload": Workload(**found["workload"]), "concurrency": concurrency}
    )


def _side(found: dict[str, Any]) -> Side:
    return Side(**{**found, "steps": tuple(map(_step, found["steps"]))})


def _step(found: dict[str, Any]) -> Step:
    summaries = {name: _summary(found[name]) for name in ("gap", "whole_answer")}
    rounds = tuple(map(_rates, found["rounds"]))
    return Step(**{**found, **summaries, "rates": _rates(found["rates"]), "rounds": rounds})


def _rates(found: dict[str, Any]) -> Rates:
    summaries = {name: _summary(found[name]) for name in ("first_token", "inter_token")}
    return Rates(**{**found, **summaries})


def _summary(found: dict[str, Any] | None) -> Summary | None:
    return None if found is None else Summary(**found)
