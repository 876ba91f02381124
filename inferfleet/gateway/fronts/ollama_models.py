"""Ollama's pages about models. Here operators deploy them, so what would change them is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from inferfleet.gateway.fronts.models import Names, Served
from inferfleet.gateway.fronts.ollama_shape import LINES, WHOLE
from inferfleet.gateway.fronts.ollama_wire import UNREADABLE, stamp
from inferfleet.gateway.request import BadRequest

VERSION = "0.32.6"  # a release whose chat, generate, embed and show are what is answered here
FOREVER = "2318-01-01T00:00:00Z"  # what Ollama itself says of models that stay loaded
_OPERATORS = "models of this gateway are deployed by its operators"
_encode = msgspec.json.encode


class Answer(NamedTuple):
    """A page."""

    status: int
    content_type: str
    body: bytes


class _Asked(Struct):
    model: str | None = None
    name: str | None = None  # older clients
    stream: bool | None = None


_asked = msgspec.json.Decoder(_Asked).decode


def tags(served: Iterable[Served], now: int) -> bytes:
    """GET /api/tags: every name with its tag; `now` in seconds for an unknown `created`."""
    return _encode({"models": [_listed(model, name, now) for model, name in _all(served)]})


def ps(served: Iterable[Served]) -> bytes:
    """GET /api/ps: all models, since all are loaded, on GPUs, and stay."""
    models = []
    for model, name in _all(served):
        entry = _identity(model, name) | {"expires_at": FOREVER, "size_vram": _size(model)}
        models.append(entry | {"context_length": model.context_length or 0})
    return _encode({"models": models})


def show(model: Served, now: int) -> bytes:
    """POST /api/show."""
    family = _family(model)
    info: dict[str, Any] = {"general.architecture": family, "general.basename": model.name}
    parameters = []
    if model.context_length:
        info[f"{family}.context_length"] = model.context_length
        parameters.append(f"{'num_ctx':<30} {model.context_length}")
    if model.max_output:
        parameters.append(f"{'num_predict':<30} {model.max_output}")
    can = capabilities(model)
    gap = "{{ .Suffix }}" if "insert" in can else ""
    return _encode(
        {
            "modelfile": f"# {_OPERATORS}\nFROM {model.name}\n",
            "parameters": "\n".join(parameters),
            "template": "{{ .System }}{{ .Prompt }}" + gap,
            "details": _details(model),
            "model_info": info,
            "capabilities": can,
            "modified_at": stamp((model.created or now) * 10**9),
        }
    )


def version() -> bytes:
    """GET /api/version; clients ask it before they use newer fields."""
    return _encode({"version": VERSION})


def asked(body: bytes) -> tuple[str, bool]:
    """The model that a body names, and whether a stream is wanted. BadRequest."""
    try:
        found = _asked(body)
    except UNREADABLE as error:
        raise BadRequest(str(error)) from None
    name = found.model or found.name
    if not name:
        raise BadRequest("model is required", "model")
    return name, found.stream is not False


def pull(body: bytes, names: Names) -> Answer:
    """POST /api/pull: a model that is served is there already. BadRequest."""
    name, stream = asked(body)
    if names.resolve(name) is None:
        return Answer(404, WHOLE, _encode({"error": f"model '{name}' not found; {_OPERATORS}"}))
    success = _encode({"status": "success"})
    if not stream:
        return Answer(200, WHOLE, success)
    return Answer(200, LINES, _encode({"status": "pulling manifest"}) + b"\n" + success + b"\n")


def refused() -> Answer:
    """What create, copy, delete, push and blobs get."""
    return Answer(403, WHOLE, _encode({"error": _OPERATORS}))


def missing(name: str) -> Answer:
    """What a page about an unknown model gets."""
    return Answer(404, WHOLE, _encode({"error": f"model '{name}' not found"}))


def capabilities(model: Served) -> list[str]:
    """In Ollama's words, which clients choose by."""
    if model.embeddings:
        return ["embedding"]
    found = ["completion"]
    found += ["tools"] if model.tools else []
    found += ["vision"] if model.vision else []
    more = model.details.get("capabilities") or []
    return found + [one for one in more if one not in found]


def _all(served: Iterable[Served]) -> list[tuple[Served, str]]:
    return [(model, name) for model in served for name in model.names]


def _listed(model: Served, name: str, now: int) -> dict[str, Any]:
    return _identity(model, name) | {"modified_at": stamp((model.created or now) * 10**9)}


def _identity(model: Served, name: str) -> dict[str, Any]:
    tagged = name if ":" in name else f"{name}:latest"
    return {
        "name": tagged,
        "model": tagged,
        "size": _size(model),
        "digest": hashlib.sha256(model.name.encode()).hexdigest(),
        "details": _details(model),
    }


def _size(model: Served) -> int:
    return int(model.details.get("size") or 0)


def _family(model: Served) -> str:
    return str(model.details.get("family") or "unknown")


def _details(model: Served) -> dict[str, Any]:
    details, family = model.details, _family(model)
    return {
        "parent_model": "",
        "format": details.get("format") or "safetensors",
        "family": family,
        "families": details.get("families") or [family],
        "parameter_size": details.get("parameter_size") or "",
        "quantization_level": details.get("quantization_level") or "",
    }
