"""The model catalogue, and models that are not in it: read from config.json, or given by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from inferfleet.capacity.config import from_config
from inferfleet.capacity.dimensions import (
    CapacityError,
    Dimensions,
    Experts,
    Latent,
    Recurrent,
)
from inferfleet.capacity.gpus import read_data

_PARTS = {"experts": Experts, "latent": Latent, "recurrent": Recurrent}


@cache
def models() -> dict[str, Dimensions]:
    """The catalogue by repository name; each entry's `source` says where its shape comes from."""
    return {name: _model(name, row) for name, row in read_data("models.yaml").items()}


def _model(name: str, row: Mapping[str, Any]) -> Dimensions:
    shape = {
        key: _PARTS[key](**value) if key in _PARTS else value for key, value in row["shape"].items()
    }
    about = dict(row["about"])
    about["tasks"] = tuple(about["tasks"])
    return Dimensions(name=name, **shape, **about)


@cache
def _index() -> dict[str, Dimensions]:
    short = {name.split("/")[-1].lower(): each for name, each in models().items()}
    return short | {name.lower(): each for name, each in models().items()}


def model(name: str) -> Dimensions:
    """The model of that repository, with or without its owner; quantized copies are looked
    up under the name they were made from (`...-AWQ`, `...-FP8`).

    Raises CapacityError with a near name when it is not in the catalogue.
    """
    key = name.lower()
    for ending in ("", "-awq", "-gptq-int4", "-gptq-int8", "-fp8", "-fp8-dynamic", "-nvfp4"):
        if key.endswith(ending) and (found := _index().get(key.removesuffix(ending))):
            return found
    near = get_close_matches(key, list(_index()), 1)
    hint = f"; did you mean {_index()[near[0]].name}?" if near else ""
    raise CapacityError(f"{name!r} is not in the model catalogue{hint}")


def from_folder(folder: Path) -> tuple[Dimensions, int | None]:
    """(dimensions, weight bytes) of a downloaded model: its config.json, and the total size in
    model.safetensors.index.json, or of its safetensors files; None without either.

    Raises CapacityError when config.json is missing, is not JSON or lacks a field.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CapacityError(f"{folder}: config.json cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CapacityError(f"{folder}: config.json is not an object")
    return from_config(folder.name, config), _weights_in(folder)


def _weights_in(folder: Path) -> int | None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        if total:
            return int(total)
    return sum(each.stat().st_size for each in folder.glob("*.safetensors")) or None
