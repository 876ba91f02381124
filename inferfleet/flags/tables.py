"""Which release of an engine knows which flag and which environment variable.

`python -m inferfleet.flags.build` writes vllm.json from the released packages; tgi.json and
ollama.json are small and kept by hand, from the launcher's reference and envconfig/config.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

Kind = Literal["switch", "toggle", "maybe", "list", "value", ""]
TITLES = {"vllm": "vLLM", "tgi": "TGI", "ollama": "Ollama"}


@dataclass(frozen=True, slots=True)
class Span:
    """A flag from one release to another, both by their index, and what it takes.

    A switch takes nothing, a toggle neither and has a --no- form, `maybe` none or one value, a
    list one or more. `values` is empty when any will do.
    """

    first: int
    last: int
    kind: Kind = ""
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """All releases looked at, oldest first, and the spans of each name."""

    engine: str
    releases: tuple[str, ...]
    flags: Mapping[str, tuple[Span, ...]]
    variables: Mapping[str, tuple[Span, ...]]

    @property
    def title(self) -> str:
        return TITLES[self.engine]

    @cached_property
    def _keys(self) -> list[tuple[int, ...]]:
        return [release(known) for known in self.releases]

    def near(self, version: str) -> tuple[int, ...]:
        """The index of `version`; between two releases that are known, those of both."""
        wanted, keys = release(version), self._keys
        if wanted in keys:
            return (keys.index(wanted),)
        later = next((i for i, key in enumerate(keys) if key > wanted), len(keys))
        return tuple(i for i in (later - 1, later) if 0 <= i < len(keys))

    def judged_by(self, version: str) -> str:
        """Which releases stand for `version`, where it is not among them; else nothing."""
        names = [self.releases[i] for i in self.near(version)]
        return "" if names == [version] else f"; judged by {' and '.join(names)}"

    def newer(self, version: str) -> bool:
        """Whether `version` came after all that is known here, and may have what is not."""
        return release(version) > release(self.releases[-1])

    def span(self, spans: Sequence[Span], version: str) -> Span | None:
        """The span `version` falls into, if any; either neighbour's will do."""
        near = self.near(version)
        return next((s for s in spans if any(s.first <= i <= s.last for i in near)), None)


@lru_cache(maxsize=1024)  # every instance of a fleet asks
def release(version: str) -> tuple[int, ...]:
    """What releases are ordered by: `0.9.2` and `0.9.2.post1` are (0, 9, 2) and (0, 9, 2, 1)."""
    return tuple(map(int, re.findall(r"\d+", version)))


@cache
def table(engine: str) -> Table:
    """The table of an engine; raises KeyError for one that has none."""
    if engine not in TITLES:
        raise KeyError(engine)
    path = Path(__file__).with_name(f"{engine}.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    flags, variables = _spans(found["flags"]), _spans(found["variables"])
    return Table(engine, tuple(found["releases"]), flags, variables)


def _spans(entries: Mapping[str, list[list[Any]]]) -> dict[str, tuple[Span, ...]]:
    return {name: tuple(_span(*one) for one in own) for name, own in entries.items()}


def _span(first: int, last: int, kind: Kind = "", values: Sequence[str] = ()) -> Span:
    return Span(first, last, kind, tuple(values))


def has(engine: str, version: str, flag: str) -> bool:
    """Whether that release surely takes `flag`: between releases, both neighbours must."""
    known = table(engine)
    spans = known.flags.get(flag, ())
    return all(any(s.first <= i <= s.last for s in spans) for i in known.near(version))
