"""What a deployed model can: its context, tools, images, embeddings. Read off the plan. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inferfleet.errors import Error
from inferfleet.model import Deployment, Instance

LONGEST_ANSWER = 8192  # tokens; what coder models of today were trained to write at once

_CONTEXT = {"ollama": "context_length", "tgi": "max_total_tokens"}  # option; else max_model_len
# families in Ollama's library whose template offers tools, and so whose requests may have them
_OLLAMA_TOOLS = frozenset(
    (
        *("cogito", "command-a", "command-r", "command-r-plus", "command-r7b", "devstral"),
        *("firefunction-v2", "gpt-oss", "granite3.1-dense", "granite3.2", "granite3.3", "granite4"),
        *("hermes3", "llama3.1", "llama3.2", "llama3.3", "llama4", "magistral", "mistral"),
        *("mistral-large", "mistral-nemo", "mistral-small", "mistral-small3.1", "mistral-small3.2"),
        *("mixtral", "nemotron", "phi4-mini", "qwen2", "qwen2.5", "qwen2.5-coder", "qwen3"),
        *("qwen3-coder", "qwen3-vl", "qwq", "smollm2"),
    )
)
_VISION = re.compile(r"(?<![a-z0-9])(vl|vision|llava|pixtral|internvl|minicpm-v)(?![a-z])|\dvl\b")
_EMBEDS = re.compile(r"embed|(?<![a-z0-9])(bge|e5|gte|minilm)(?![a-z0-9])")


def context(role: str, instances: Iterable[Instance]) -> int:
    """Tokens of prompt and answer together: the least that any of the instances takes.

    Raises Error where the inventory does not say it.
    """
    found = [_context(role, instance) for instance in instances]
    return min(found)


def _context(role: str, instance: Instance) -> int:
    options, model = instance.options, instance.deployment.model
    asked = options.get(_CONTEXT.get(role, "max_model_len"))
    if role == "ollama":
        asked = options.get("modelfile", {}).get("parameters", {}).get("num_ctx", asked)
        # 0 leaves it to Ollama, which looks at the GPU; it never goes beyond the model's own
        tokens = min(asked, model.context_length or asked) if asked else 0
    else:
        tokens = asked or model.context_length or 0
    if not tokens:
        option = _CONTEXT.get(role, "max_model_len")
        raise Error(
            f"deployments.{instance.deployment.name}: nothing says how many tokens its context has;"
            f" set {option} among its options"
        )
    return int(tokens)


def longest_answer(role: str, tokens: int, instances: Sequence[Instance]) -> int:
    """Tokens of one answer, such that a prompt of the rest of the context is not refused."""
    prompts: list[int] = [
        i.options["max_input_tokens"] for i in instances if "max_input_tokens" in i.options
    ]
    if role == "tgi" and prompts:
        return max(1, tokens - min(prompts))
    return share(tokens)


def share(tokens: int) -> int:
    """The part of a context that is left to the answer where nobody says: a quarter of it."""
    return max(1, min(LONGEST_ANSWER, tokens // 4))


def tools(role: str, deployment: Deployment) -> bool:
    """Whether requests may offer tools.

    vLLM needs a parser; TGI's grammar does it for any model; with Ollama the model's template
    decides; the simulator never calls one.
    """
    if role == "ollama":
        return _ollama_tools(deployment.model.repository, deployment.options.get("modelfile", {}))
    if role == "tgi":
        return "--disable-grammar-support" not in deployment.extra_args
    if role == "simulator":
        return False
    words = deployment.extra_args
    given = any(word.startswith("--tool-call-parser") for word in words)
    return given or "tool_call_parser" in deployment.options


def _ollama_tools(repository: str, modelfile: Mapping[str, Any]) -> bool:
    if "template" in modelfile:
        return ".Tools" in str(modelfile["template"])
    family = repository.rpartition("/")[2].partition(":")[0]
    return family in _OLLAMA_TOOLS and not repository.startswith("/")


def vision(deployment: Deployment) -> bool:
    """Whether it reads images, by its name."""
    return bool(_VISION.search(deployment.model.repository.lower()))


def embeddings(deployment: Deployment) -> bool:
    """Whether it makes embeddings, and no text."""
    line = " ".join(deployment.extra_args).replace("=", " ")
    asked = any(words in line for words in ("--runner pooling", "--convert embed", "--task embed"))
    return asked or bool(_EMBEDS.search(deployment.model.repository.lower()))
