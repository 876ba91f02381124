"""What a run came to, and what a reader of it must know. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from inferfleet.load.compare import ENOUGH, Ratio, ratios
from inferfleet.load.statistics import Round, Step, examples, step
from inferfleet.load.target import Target
from inferfleet.load.workload import Method

BUSY = 0.8  # share of a core from which on we may have been the bottleneck
LATE = 0.02  # seconds our own timers may be late
SHORT = 0.9  # share of the wanted length below which answers count as short


@dataclass(frozen=True, slots=True)
class Side:
    """One target's steps; `said` are the first words of each kind of error."""

    name: str
    url: str
    model: str
    api: str
    user: str
    steps: tuple[Step, ...]
    said: dict[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """All there is to show. With two sides, `ratios` are the second's over the first's."""

    method: Method
    sides: tuple[Side, ...]
    ratios: tuple[Ratio, ...]
    warnings: tuple[str, ...]
    interleaved: bool
    interrupted: bool


def side(target: Target, number: int, rounds: Sequence[Round]) -> Side:
    """The steps of target number `number`, in the order they were measured."""
    own = [each for each in rounds if each.target == number and each.samples]
    steps = tuple(
        step(list(group)) for _, group in itertools.groupby(own, lambda each: each.concurrency)
    )
    said = examples(sample for each in own for sample in each.samples)
    return Side(target.name, target.url, target.model, target.api, target.user, steps, said)


def outcome(
    method: Method, sides: Sequence[Side], *, interrupted: bool, before: Method | None = None
) -> Outcome:
    """Ratios and warnings; `before` is the method of a saved first side."""
    sides = _told_apart(sides)
    found = tuple(ratios(sides[0].steps, sides[1].steps)) if len(sides) > 1 else ()
    warnings = [line for each in sides for line in _warnings(each, method)]
    warnings += _comparing(sides, found) if len(sides) > 1 else ()
    warnings += _unlike(before, method) if before else ()
    if interrupted:
        warnings.append("interrupted: what was not reached is missing")
    interleaved = len(sides) > 1 and before is None
    return Outcome(
        method,
        tuple(sides),
        found,
        tuple(warnings),
        interleaved=interleaved,
        interrupted=interrupted,
    )


def _told_apart(sides: Sequence[Side]) -> Sequence[Side]:
    names = [each.name for each in sides]
    if len(set(names)) == len(names):
        return sides
    return [replace(each, name=f"{each.name} ({letter})") for each, letter in zip(sides, "AB")]  # noqa: B905


def _warnings(side: Side, method: Method) -> Iterator[str]:
    for each in side.steps:
        where = f"{side.name} at {each.concurrency}"
        if each.client_cpu >= BUSY:
            yield (
                f"{where}: this client took {each.client_cpu:.0%} of a core: it was the "
                "bottleneck, not the target"
            )
        if each.client_lag_p99 > LATE:
            late = 1000 * each.client_lag_p99
            yield f"{where}: this machine was busy: timers came {late:.0f} ms late (p99)"
        if not each.complete:
            yield f"{where}: cut short, so its rates are too low"
        if sum(each.errors.values()) == each.requests:
            yield f"{where}: no request was answered; the target's further steps were left out"
    yield from _lengths(side, method)


def _lengths(side: Side, method: Method) -> Iterator[str]:
    wanted = method.workload
    answered = [each for each in side.steps if each.output_tokens]
    if any(each.counted_chunks for each in answered):
        yield f"{side.name}: the server told no token counts: tokens are counted chunks"
    least = min((each.output_tokens for each in answered), default=wanted.output_tokens)
    if least < SHORT * wanted.output_tokens:
        yield (
            f"{side.name}: answers ended after {least:.0f} tokens on average, of "
            f"{wanted.output_tokens} asked for (--ignore-eos prevents that with vLLM)"
        )
    prompts = [each.prompt_tokens for each in answered if each.prompt_tokens]
    off = max((abs(p - wanted.prompt_tokens) for p in prompts), default=0)
    if off > (1 - SHORT) * wanted.prompt_tokens:
        shown = " to ".join(dict.fromkeys(f"{p:.0f}" for p in (min(prompts), max(prompts))))
        yield f"{side.name}: prompts had {shown} tokens, of {wanted.prompt_tokens} asked for"


def _comparing(sides: Sequence[Side], found: Sequence[Ratio]) -> Iterator[str]:
    first, second = (_mean_length(each) for each in sides)
    if first and second and not SHORT <= second / first <= 1 / SHORT:
        yield (
            f"answers differ in length ({first:.0f} and {second:.0f} tokens): compare tokens/s "
            "and inter-token latency, not requests/s"
        )
    if not found:
        yield "the two have no step in common: nothing to compare"
    elif all(each.verdict == "unknown" for each in found):
        yield f"fewer than {ENOUGH} repeats of a side: what is within the noise is unknown"


def _mean_length(side: Side) -> float:
    lengths = [each.output_tokens for each in side.steps if each.output_tokens]
    return sum(lengths) / len(lengths) if lengths else 0.0


def _unlike(before: Method, method: Method) -> Iterator[str]:
    yield "not measured in turns: what else changed since the saved run counts as a difference"
    for name in ("prompt_tokens", "output_tokens", "shared_prefix", "ignore_eos"):
        old, new = getattr(before.workload, name), getattr(method.workload, name)
        if old != new:
            yield f"the saved run had another {name.replace('_', ' ')}: {old}, now {new}"
