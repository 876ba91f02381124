"""A model's dimensions from the catalogue, a folder, or its Hugging Face repository.

Only `fit`, `recommend` and `size` ask the repository; checking an inventory touches no network.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from inferfleet import capacity, sizing
from inferfleet.capacity import CapacityError
from inferfleet.sizing import Shape

TIMEOUT = 10  # seconds
LARGEST = 64 << 20  # bytes; an index of safetensors has some megabytes
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(name: str) -> Shape:
    """The dimensions of a model: of the catalogue, an Ollama tag, a folder or config.json, or of
    the Hugging Face repository at HF_ENDPOINT. Raises CapacityError saying what was tried."""
    path = Path(name).expanduser()
    if name.startswith(("/", "./", "../", "~")) or path.name == "config.json":
        return sizing.from_path(path)
    try:
        return Shape(sizing.by_tag(name) if ":" in name else capacity.model(name))
    except CapacityError as error:
        if path.is_dir():
            return sizing.from_path(path)
        if not _REPOSITORY.fullmatch(name):
            raise
        return _from_repository(name, str(error))


def _from_repository(name: str, why: str) -> Shape:
    try:
        config = _json(f"{name}/resolve/main/config.json")
    except CapacityError as error:
        said = f"{why}; its repository: {error}; give a config.json's path instead"
        raise CapacityError(said) from None
    weights = None
    try:
        index = _json(f"{name}/resolve/main/model.safetensors.index.json")
        weights = int(index.get("metadata", {}).get("total_size") or 0) or None
    except CapacityError:
        pass  # a small model has one file and no index; the formula will do
    return Shape(capacity.from_config(name, config), weights)


def _json(path: str) -> dict[str, Any]:
    """A JSON object of the Hub. Raises CapacityError with what the Hub, or the network, said."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not endpoint.startswith(("https://", "http://")):
        raise CapacityError(f"HF_ENDPOINT is no http or https address: {endpoint!r}")
    request = urllib.request.Request(f"{endpoint.rstrip('/')}/{path}")  # noqa: S310 - checked above
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
            found = json.loads(answer.read(LARGEST))
    except urllib.error.HTTPError as error:
        raise CapacityError(_refused(error.code, endpoint)) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CapacityError(f"{endpoint} cannot be reached ({reason})") from None
    except ValueError:
        raise CapacityError(f"{endpoint} answered with something else than JSON") from None
    if not isinstance(found, dict):
        raise CapacityError(f"{endpoint} answered with something else than an object")
    return found


def _refused(code: int, endpoint: str) -> str:
    if code in (401, 403):
        return f"{endpoint} wants a token for it, or there is none such (HF_TOKEN)"
    return f"{endpoint} has none" if code == 404 else f"{endpoint} answered {code}"
