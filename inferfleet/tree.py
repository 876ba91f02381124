"""Rendered bundles as a folder for review: build/<phase>/<host>/<absolute path>, and an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inferfleet.errors import Error
from inferfleet.model import Artefact, Bundle, Plan

INDEX = "index.json"
_MADE_BY = "inferfleet render"


def write(
    folder: Path, bundles: Iterable[Bundle], plan: Plan | None = None
) -> dict[str, dict[str, Any]]:
    """Write the bundles below `folder` and remove what an earlier render left there.

    The tree is the same, byte for byte, for the same inventory. A folder that is not empty and
    was not made by a render is refused. Returns the index: per host its files and ensures, and
    with the plan its engine instances and their GPUs.
    """
    _clear(folder)
    index: dict[str, dict[str, Any]] = {}
    for bundle in bundles:
        index[bundle.host.name] = entry(bundle)
        if plan:
            index[bundle.host.name]["instances"] = _instances(plan, bundle)
        for artefact in bundle.artefacts:
            path = folder / bundle.host.name / artefact.path.removeprefix("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(artefact.content)
            path.chmod(0o755 if artefact.mode & 0o100 else 0o644)  # what git keeps; no secrets here
    text = json.dumps({"made_by": _MADE_BY, "hosts": index}, indent=2, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    return index


def entry(bundle: Bundle) -> dict[str, Any]:
    """What the index says of one host."""
    return {
        "files": [_file(artefact) for artefact in bundle.artefacts],
        "ensures": [asdict(ensure) for ensure in bundle.ensures],
    }


def _instances(plan: Plan, bundle: Bundle) -> list[dict[str, Any]]:
    found = [i for step in plan.steps[bundle.host.name] for i in step.instances]
    return [{"name": i.name, "port": i.port, "gpus": list(i.gpus)} for i in found]


def _file(artefact: Artefact) -> dict[str, Any]:
    """A secret file's digest is left out: it would be the mask's."""
    return {
        "path": artefact.path,
        "mode": f"{artefact.mode:04o}",
        "owner": artefact.owner,
        "group": artefact.group,
        "sha256": None if artefact.secret else artefact.digest,
        "secret": artefact.secret,
        "restarts": list(artefact.restarts),
        "reloads": list(artefact.reloads),
    }


def _clear(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or folder.is_symlink():
        raise Error(f"{folder}: is not a folder; name another one with --output")
    if any(folder.iterdir()):
        try:
            made_by = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("made_by")
        except (OSError, ValueError, AttributeError):
            made_by = None
        if made_by != _MADE_BY:
            raise Error(f"{folder}: holds something that no render made; name another --output")
    shutil.rmtree(folder)
