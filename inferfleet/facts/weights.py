"""How large a model's weights are, and where an engine keeps them."""

from __future__ import annotations

from inferfleet.capacity import CapacityError, model, quantization
from inferfleet.model import Instance, Model, Plan
from inferfleet.modelpath import cached

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


def home(role: str, instance: Instance, plan: Plan) -> str | None:
    """The folder on its host that an instance's model is downloaded to.

    None where nothing is: the model is a path on the host, or comes from a mounted share.
    """
    if instance.deployment.model.repository.startswith("/"):
        return None
    if found := cached(instance, plan):
        return found.folder if found.local else None
    return _FOLDERS.get(role, CACHE)


def places(role: str, instance: Instance, plan: Plan) -> list[str]:
    """Folders that hold the model's files once it is downloaded."""
    here = home(role, instance, plan)
    if here is None or cached(instance, plan):
        return [here] if here else []
    name = "models--" + instance.deployment.model.repository.replace("/", "--")
    return [f"{here}/huggingface/hub/{name}", f"{here}/huggingface/{name}", f"{here}/{name}"]
