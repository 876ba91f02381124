"""Writes a client's configuration where there is none; joins, or leaves alone, what is there.

Other entries of the user are kept. A file that cannot be joined without loss (comments, duplicate
keys, YAML, programs) is never changed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inferfleet.clients.access import Configuration
from inferfleet.errors import Error

_INSTEAD = "without --write, the command prints what belongs into it"


def write(path: Path, made: Configuration) -> str:
    """Bring a file up to date; returns what was done to it. Raises Error rather than harm it."""
    path = path.expanduser().resolve()  # a symbolic link stays one
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, made.text, 0o644)
        return "written"
    there = path.read_text(encoding="utf-8", errors="surrogateescape")
    wanted = made.text if there == made.text else _joined(path, there, made)
    if wanted == there or _says_the_same(made, wanted, there):
        return "as it was"
    _replace(path, wanted, path.stat().st_mode & 0o777)
    return "brought up to date; its other entries are as they were"


def _joined(path: Path, there: str, made: Configuration) -> str:
    if not there.strip():
        return made.text
    if not made.merge:
        raise Error(f"{path}: is there already, and is not ours to change; {_INSTEAD}")
    try:
        found = json.loads(there, object_pairs_hook=_once)
        joined = _MERGES[made.merge](found, json.loads(made.text))
    except (ValueError, TypeError, AttributeError) as error:
        raise Error(f"{path}: cannot be changed without loss ({error}); {_INSTEAD}") from error
    indent = "\t" if "\n\t" in there else 2
    return json.dumps(joined, indent=indent, ensure_ascii=False) + "\n"


def _says_the_same(made: Configuration, wanted: str, there: str) -> bool:
    """Whether only white space differs: nobody's own formatting is undone for that."""
    return bool(made.merge and there.strip()) and json.loads(wanted) == json.loads(there)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _vscode(there: Any, ours: Any) -> Any:
    """Our groups in place of those of the same name; the reference to a key entered stays."""
    if not isinstance(there, list) or not all(isinstance(group, dict) for group in there):
        raise TypeError("not an array of groups")
    new = {(group["vendor"], group["name"]): group for group in ours}
    kept = [_group(old, new.pop((old.get("vendor"), old.get("name")), None)) for old in there]
    return [*kept, *new.values()]


def _group(old: dict[str, Any], new: dict[str, Any] | None) -> dict[str, Any]:
    if new is None:
        return old
    key = {"apiKey": old["apiKey"]} if "apiKey" in old and "apiKey" in new else {}
    without = {name: value for name, value in old.items() if name != "apiKey"}
    return {**without, **new, **key}


def _opencode(there: Any, ours: Any) -> Any:
    """Our providers beside the others; a default model that was chosen stays."""
    providers = there.get("provider", {})
    if not isinstance(providers, dict):
        raise TypeError("provider is not an object")
    return {**ours, **there, "provider": {**providers, **ours["provider"]}}


_MERGES: dict[str, Callable[[Any, Any], Any]] = {"vscode": _vscode, "opencode": _opencode}


def _replace(path: Path, text: str, mode: int) -> None:
    """Write beside the file and rename: whoever reads along sees the old or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(mode)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
