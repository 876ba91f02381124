"""What running engines taught about their hosts' memory; kept beside the inventory, committed.

calibration.json maps "host/GPU/model/engine version" to what was seen and the bytes by which the
next prediction there is corrected. `verify` writes it, never from a rehearsal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inferfleet.errors import Error
from inferfleet.model import Instance

FILE = "calibration.json"
NOISE = 16 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Observed:
    """One engine, seen running: `reported` and `predicted` are KV tokens (Ollama: bytes)."""

    key: str
    reported: int
    predicted: int
    correction: int


def key(instance: Instance, gpu: str) -> str:
    """What a correction holds for: this model and release on this GPU of this host."""
    version = str(instance.options.get("version", ""))
    engine = f"{instance.deployment.engine} {version}".strip()
    return "/".join((instance.host.name, gpu, instance.deployment.model.name, engine))


def load(folder: Path) -> Mapping[str, int]:
    """The corrections by key, bytes; none without the file. Raises Error when it is not ours."""
    path = folder / FILE
    if not path.exists():
        return {}
    return {name: int(each["correction"]) for name, each in _entries(path).items()}


def record(folder: Path, seen: Iterable[Observed]) -> int:
    """Add what was seen to the file; returns how many entries changed.

    Of several instances with one key, the one that took the most memory counts. What is known
    already but for a few blocks of cache is left as it is.
    """
    path = folder / FILE
    before = _entries(path) if path.exists() else {}
    found: dict[str, dict[str, Any]] = {}
    for each in sorted(seen, key=lambda each: each.correction):
        found[each.key] = {name: v for name, v in asdict(each).items() if name != "key"}
    changed = {name: e for name, e in found.items() if not _known(before.get(name), e)}
    if changed:
        text = json.dumps(before | changed, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return len(changed)


def _known(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    return before is not None and abs(before["correction"] - now["correction"]) <= NOISE


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(each["correction"], int) for each in entries.values())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Error("is not what verify wrote; remove it, and verify again")
    return entries
