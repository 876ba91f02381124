"""How large a model's weights are, and where an engine keeps them."""

from __future__ import annotations

from inferfleet.capacity import CapacityError, model, quantization
from inferfleet.model import Instance, Model

CACHE = "/var/cache/inferfleet"
_FOLDERS = {"ollama": "/var/lib/ollama"}  # engine -> where it downloads to


def weight_bytes(entry: Model) -> int | None:
    """Bytes of the weights on disk, which is also what they take of the GPUs; None: not known."""
    try:
        shape = model(entry.repository)
        stored = quantization(entry.quantization or shape.native)
    except CapacityError:
        return None
    return round(shape.linear_params * stored.linear + shape.plain_params * stored.plain)


def folder(role: str) -> str:
    """The folder below which an engine's downloads lie."""
    return _FOLDERS.get(role, CACHE)


def places(role: str, instance: Instance) -> list[str]:
    """Where the model's files would lie, if they were downloaded already."""
    name = "models--" + instance.deployment.model.repository.replace("/", "--")
    here = folder(role)
    return [f"{here}/huggingface/hub/{name}", f"{here}/huggingface/{name}", f"{here}/{name}"]


def downloads(instance: Instance) -> bool:
    """Whether the engine fetches the model itself; a path on the host is there already."""
    return not instance.deployment.model.repository.startswith("/")
