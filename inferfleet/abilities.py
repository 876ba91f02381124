"""What a deployed model can: its context, tools, images, embeddings. Read off the plan. Pure.

What is not known of a model is not said of it; the gateway's `models` settings say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from inferfleet.model import Instance

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
_POOLING = ("--runner pooling", "--convert embed", "--task embed")


@dataclass(frozen=True, slots=True)
class Abilities:
    """Of a model, at all of the instances that serve it. Sizes are tokens."""

    context: int | None  # of prompt and answer together; None: nothing says it
    tools: bool  # whether requests may offer them
    vision: bool  # whether it reads images
    embeddings: bool  # whether it makes these, and no text


def abilities(role: str, instances: Sequence[Instance]) -> Abilities:
    """What the instances of one deployment, run by a role, have in common."""
    sizes = [_context(role, instance) for instance in instances]
    repository = instances[0].deployment.model.repository.lower()
    return Abilities(
        context=min(filter(None, sizes)) if all(sizes) else None,
        tools=all(_tools(role, instance) for instance in instances),
        vision=bool(_VISION.search(repository)),
        embeddings=role != "simulator" and _embeds(instances[0], repository),
    )


def common(every: Sequence[Abilities]) -> Abilities:
    """What all deployments that share a model's requests can."""
    sizes = [each.context for each in every]
    return Abilities(
        context=min(filter(None, sizes)) if every and all(sizes) else None,
        tools=bool(every) and all(each.tools for each in every),
        vision=bool(every) and all(each.vision for each in every),
        embeddings=bool(every) and all(each.embeddings for each in every),
    )


def context_option(role: str) -> str:
    """The option of an engine that says how long its context is."""
    return _CONTEXT.get(role, "max_model_len")


def _context(role: str, instance: Instance) -> int | None:
    options, model = instance.options, instance.deployment.model
    asked = options.get(context_option(role))
    if role != "ollama":
        return asked or model.context_length
    asked = options.get("modelfile", {}).get("parameters", {}).get("num_ctx", asked)
    # 0 leaves it to Ollama, which looks at the GPU; it never goes beyond the model's own
    return min(asked, model.context_length or asked) if asked else None


def longest_answer(role: str, context: int, instances: Sequence[Instance]) -> int:
    """Tokens of one answer, such that a prompt of the rest of the context is not refused."""
    prompts: list[int] = [
        i.options["max_input_tokens"] for i in instances if "max_input_tokens" in i.options
    ]
    if role == "tgi" and prompts:
        return max(1, context - min(prompts))
    return share(context)


def share(context: int) -> int:
    """The part of a context that is left to the answer where nobody says: a quarter of it."""
    return max(1, min(LONGEST_ANSWER, context // 4))


def _tools(role: str, instance: Instance) -> bool:
    """vLLM needs a parser; TGI's grammar does it for any model; the simulator never calls one."""
    words = instance.deployment.extra_args
    if role == "ollama":
        return _template_has_tools(instance)
    if role == "tgi":
        return "--disable-grammar-support" not in words
    if role == "simulator":
        return False
    given = any(word.startswith("--tool-call-parser") for word in words)
    return given or "tool_call_parser" in instance.options


def _template_has_tools(instance: Instance) -> bool:
    modelfile = instance.options.get("modelfile", {})
    if "template" in modelfile:
        return ".Tools" in str(modelfile["template"])
    repository = instance.deployment.model.repository
    family = repository.rpartition("/")[2].partition(":")[0]
    return family in _OLLAMA_TOOLS and not repository.startswith("/")


def _embeds(instance: Instance, repository: str) -> bool:
    line = " ".join(instance.deployment.extra_args).replace("=", " ")
    return any(words in line for words in _POOLING) or bool(_EMBEDS.search(repository))
