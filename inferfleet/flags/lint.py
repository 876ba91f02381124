"""What is wrong with a command line or an environment, for the release that will get it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from inferfleet.flags import advice
from inferfleet.flags.tables import Span, Table, table
from inferfleet.yamlbuild import did_you_mean

_FLAG = re.compile(r"-[A-Za-z-]")  # not -1, which is a value
_JOINED = re.compile(r"-O(?!$)")  # vLLM's -O3 and -O.level=3
_PREFIXES = {"vllm": ("VLLM_",), "ollama": ("OLLAMA_",), "tgi": ()}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the engine would not take. `sure` is false where the release is newer than all
    that is known here, and may have learnt it."""

    argument: str
    message: str
    sure: bool = True


@dataclass(frozen=True, slots=True)
class _Given:
    """A flag and the values that follow it; `name` is empty for words before the first flag."""

    name: str
    values: tuple[str, ...]


def lint(engine: str, version: str, arguments: Sequence[str]) -> list[Finding]:
    """All that is wrong with arguments of a user's own, such as a deployment's extra_args."""
    owned = advice.OWNED[engine]
    found = []
    for given in _split(arguments):
        if given.name in owned:
            found.append(Finding(given.name, f"{given.name} is not for here: {owned[given.name]}"))
        else:
            found += _judged(table(engine), version, given)
    return found


def lint_own(engine: str, version: str, arguments: Sequence[str]) -> list[Finding]:
    """All that is wrong with arguments that a role made of its options."""
    return [f for given in _split(arguments) for f in _judged(table(engine), version, given)]


def lint_variables(engine: str, version: str, names: Iterable[str]) -> list[Finding]:
    """Environment variables that the engine does not read, or that the role sets itself."""
    found = (_variable(table(engine), version, name) for name in names)
    return [finding for finding in found if finding]


def _split(arguments: Sequence[str]) -> Iterator[_Given]:
    name, values = "", list[str]()
    for argument in arguments:
        if not _FLAG.match(argument):
            values.append(argument)
            continue
        if name or values:
            yield _Given(name, tuple(values))
        name, separator, value = argument.partition("=")
        values = [value] if separator else []
        if name.startswith("--"):  # as vLLM's parser does
            name = name.replace("_", "-")
    if name or values:
        yield _Given(name, tuple(values))


def _judged(known: Table, version: str, given: _Given) -> list[Finding]:
    if not given.name:
        return [Finding(given.values[0], _stray(known, given.values[0]))]
    if known.engine == "vllm" and _JOINED.match(given.name):
        return []
    name, negated = _plain(known, given.name)
    span = known.span(known.flags.get(name, ()), version)
    if span is None or (negated and span.kind != "toggle"):
        return [_unknown(known, version, given.name, name)]
    message = _values(given, "switch" if negated else span.kind, span)
    return [Finding(given.name, message)] if message else []


def _plain(known: Table, name: str) -> tuple[str, bool]:
    """The flag's own name for --no-x and for --x.key, and whether it was negated."""
    name = name.partition(".")[0].rstrip("+")
    positive = "--" + name.removeprefix("--no-")
    if name not in known.flags and name.startswith("--no-") and positive in known.flags:
        return positive, True
    return name, False


def _stray(known: Table, word: str) -> str:
    if word in ("serve", "vllm", "text-generation-launcher"):
        return f"'{word}' is there already: arguments begin after it"
    return f"'{word}' is no flag of {known.title}'s, and the model comes from the deployment"


def _values(given: _Given, kind: str, span: Span) -> str:
    """What is wrong with a flag's values; nothing mostly."""
    least, most = {"switch": (0, 0), "toggle": (0, 0), "maybe": (0, 1), "list": (1, 10**6)}.get(
        kind, (1, 1)
    )
    if len(given.values) > most:
        extra = given.values[most]
        if most == 0:
            off = f"; write --no-{given.name[2:]} to turn it off" if kind == "toggle" else ""
            return f"{given.name} takes no value, but '{extra}' follows it{off}"
        return f"{given.name} takes one value, but '{extra}' follows it"
    if len(given.values) < least:
        return f"{given.name} needs a value"
    wrong = [v for v in given.values if span.values and v not in span.values]
    if wrong:
        guess = did_you_mean(wrong[0], span.values)
        return f"{given.name} is one of {', '.join(span.values)}, not '{wrong[0]}'{guess}"
    return ""


def _unknown(known: Table, version: str, written: str, name: str) -> Finding:
    """A flag that the release does not have: since when, until when, and what to do instead."""
    here = f"{known.title} {version} has no {written}"
    instead = advice.INSTEAD[known.engine].get(name, "")
    told = f"; {instead}" if instead else ""
    spans = known.flags.get(name)
    if spans:
        return Finding(written, f"{here}: {_when(known, version, spans)}{told}")
    guess = "" if instead else did_you_mean(name, _at(known, version))
    sure = bool(instead) or not known.newer(version)
    return Finding(written, f"{here}{guess}{told}{known.judged_by(version)}", sure)


def _when(known: Table, version: str, spans: Sequence[Span]) -> str:
    """When a flag came or left, seen from a release that does not have it."""
    here = max(known.near(version))
    past = [span.last for span in spans if span.last < here]
    if past:
        return f"it left with {known.releases[max(past) + 1]}"
    return f"it came with {known.releases[spans[0].first]}"


def _at(known: Table, version: str) -> list[str]:
    return [name for name, spans in known.flags.items() if known.span(spans, version)]


def _variable(known: Table, version: str, name: str) -> Finding | None:
    if name in (owned := advice.OWNED_VARIABLES[known.engine]):
        return Finding(name, f"{name} is not for here: {owned[name]}")
    spans = known.variables.get(name, ())
    if known.span(spans, version) or not name.startswith(_PREFIXES[known.engine]):
        return None
    here = f"{known.title} {version} does not read {name}"
    instead = advice.VARIABLES[known.engine].get(name, "")
    told = f"; {instead}" if instead else ""
    if spans:
        return Finding(name, f"{here}: {_when(known, version, spans)}{told}")
    guess = "" if instead else did_you_mean(name, known.variables)
    sure = bool(instead) or not known.newer(version)
    return Finding(name, f"{here}{guess}{told}{known.judged_by(version)}", sure)
