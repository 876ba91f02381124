"""Where an inventory refers to secrets that cannot be resolved, which shows long after reading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from inferfleet import yamlfile
from inferfleet.errors import InventoryError, Problem
from inferfleet.model import Phase, Secret
from inferfleet.schema import Keys
from inferfleet.yamlbuild import dotted


def unresolved(folder: Path, phase: Phase, why: Mapping[Secret, str]) -> InventoryError:
    """Every place in `folder` that concerns the phase and refers to a secret of `why`."""
    found: dict[Secret, list[Problem]] = {}
    for file in yamlfile.inventory_files(folder)[0]:
        document, _ = yamlfile.load(file, shown=os.path.relpath(file))
        for keys, secret in _secrets(document.data, ()):
            if secret in why and _concerns(keys, phase):
                line, column = document.position(keys)
                said = why[secret].removeprefix(f"{secret}: ")
                problem = Problem(document.shown, line, column, dotted(keys), said)
                found.setdefault(secret, []).append(problem)
    placeless = [Problem(str(folder), 0, 0, "", why[secret]) for secret in why.keys() - found]
    return InventoryError([*placeless, *(p for problems in found.values() for p in problems)])


def _concerns(keys: Keys, phase: Phase) -> bool:
    if keys[0] == "phases":
        return keys[1] == phase.name
    return keys[0] != "deployments" or keys[1] in phase.deployments


def _secrets(value: object, keys: Keys) -> Iterator[tuple[Keys, Secret]]:
    if isinstance(value, Secret):
        yield keys, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(inner, (*keys, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _secrets(inner, (*keys, index))
