"""Which models there are: by name for every request, and as /v1/models lists them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

_CHOICES = ("fastest", "cheapest", "preferred")  # the Hugging Face router's
_TAKEN = 16000  # tokens that the extension sets aside for the answer, whatever the model


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it. Lengths are in tokens, `created` in seconds since the epoch.

    `details` are Ollama's (family, parameter_size, quantization_level, format, size in bytes),
    and `capabilities`: a list of what else it can do there, such as "thinking" and "insert".
    """

    name: str
    aliases: tuple[str, ...] = ()
    context_length: int | None = None
    max_output: int | None = None
    tools: bool = False
    vision: bool = False
    embeddings: bool = False
    created: int = 0
    providers: tuple[str, ...] = ("inferfleet",)
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its other names."""
        return (self.name, *self.aliases)


class Names:
    """Everything a client may call a model, ready to be looked up.

    What is written in the configuration wins over what is derived from it, so a model named
    `coder:7b` or `coder:fastest` is itself. Derived are Hugging Face's suffixes for the known
    providers, and Ollama's `:latest`, there or not. As in Ollama, case matters only where two
    names differ in nothing else.
    """

    def __init__(self, served: Iterable[Served]) -> None:
        self._models = {model.name: model for model in served}
        self._named = {name: name for name in self._models}
        for model in self._models.values():
            for alias in model.aliases:
                self._named.setdefault(alias, model.name)
        for name, model_name in list(self._named.items()):
            for derived in _derived(name, self._models[model_name].providers):
                self._named.setdefault(derived, model_name)
        self._folded: dict[str, str] = {}
        for name, model_name in self._named.items():
            self._folded.setdefault(name.lower(), model_name)

    def resolve(self, name: str) -> str | None:
        """The name of the model that is meant; None: there is none."""
        return self._named.get(name) or self._folded.get(name.lower())

    def find(self, name: str) -> Served | None:
        """The model that is meant."""
        found = self.resolve(name)
        return self._models[found] if found else None


def _derived(name: str, providers: tuple[str, ...]) -> list[str]:
    bare, _, tag = name.rpartition(":")
    spoken = [bare] if bare and tag == "latest" else [f"{name}:latest"] if ":" not in name else []
    return [*spoken, *(f"{name}:{suffix}" for suffix in (*providers, *_CHOICES))]


def openai_models(served: Iterable[Served], now: int, broken: Collection[str] = ()) -> bytes:
    """The answer to GET /v1/models: what readers of OpenAI's, vLLM's and the router's list need.

    `broken` names models that no instance can serve now; `now` stands for an unknown `created`.
    """
    entries = [
        _entry(model, name, now, model.name in broken) for model in served for name in model.names
    ]
    return msgspec.json.encode({"object": "list", "data": entries})


def openai_model(served: Served, name: str, now: int, broken: bool = False) -> bytes:
    """The answer to GET /v1/models/NAME."""
    return msgspec.json.encode(_entry(served, name, now, broken))


def _entry(model: Served, name: str, now: int, broken: bool) -> dict[str, Any]:
    inputs = ["text", "image"] if model.vision else ["text"]
    outputs = ["embedding"] if model.embeddings else ["text"]
    entry: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": model.created or now,
        "owned_by": "inferfleet",
        "root": model.name,
        "parent": None,
        "architecture": {"input_modalities": inputs, "output_modalities": outputs},
        "providers": [_provider(model, provider, broken) for provider in unique(model.providers)],
    }
    if model.context_length:
        entry["max_model_len"] = model.context_length
    return entry


def _provider(model: Served, provider: str, broken: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "provider": provider,
        "status": "error" if broken else "live",
        "supports_tools": model.tools,
        "supports_structured_output": not model.embeddings,
        "is_model_author": False,
        "pricing": {"input": 0, "output": 0},
    }
    if model.context_length:
        entry["context_length"] = router_length(model.context_length)
    return entry


def router_length(true: int) -> int:
    """The context length for readers of `providers`, in tokens.

    They are the Hugging Face extension, which takes 16,000 off for the answer and refuses
    prompts beyond the rest: all of them at 16,000 or less. So it always gets half of the true
    length for the prompt. An engine that is asked for more says so in a 400 ("This model's
    maximum context length is ..."), which the extension shows as it is; and max_model_len,
    which it does not read, is always true.
    """
    return max(true, _TAKEN + true // 2)


def unique(names: Iterable[str]) -> list[str]:
    """The names without repetitions, in order."""
    return list(dict.fromkeys(names))
