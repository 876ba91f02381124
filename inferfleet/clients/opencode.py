"""opencode's opencode.json. Source: the schema that it publishes, and opencode itself."""

from __future__ import annotations

import json
from typing import Any

from inferfleet.clients.access import Access, Configuration, Endpoint, Served

SCHEMA = "https://opencode.ai/config.json"
PLACE = "opencode.json in the project, or ~/.config/opencode/opencode.json"


def configuration(access: Access) -> Configuration:
    """A provider for each base URL; the first model that takes tools is the default."""
    chats = access.chats()
    endpoint, model = next((found for found in chats if found[1].tools), chats[0])
    whole = {
        "$schema": SCHEMA,
        "provider": {e.name: _provider(e, access) for e in access.endpoints if _models(e)},
        "model": f"{endpoint.name}/{model.name}",
    }
    text = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    return Configuration(text, PLACE, tuple(_notes(access)), merge="opencode")


def _provider(endpoint: Endpoint, access: Access) -> dict[str, Any]:
    return {
        "npm": "@ai-sdk/openai-compatible",
        "name": endpoint.name,
        "options": {
            "baseURL": endpoint.base,
            **({"apiKey": f"{{env:{access.key}}}"} if access.key else {}),
        },
        "models": _models(endpoint),
    }


def _models(endpoint: Endpoint) -> dict[str, Any]:
    return {model.name: _model(model) for model in endpoint.models if not model.embeddings}


def _model(model: Served) -> dict[str, Any]:
    reads = ["text", "image"] if model.vision else ["text"]
    return {
        "name": model.name,
        "tool_call": model.tools,
        "attachment": model.vision,
        "modalities": {"input": reads, "output": ["text"]},
        "limit": {"context": model.context, "output": model.output},
    }


def _notes(access: Access) -> list[str]:
    notes = []
    if plain := access.without_tools():
        notes.append(f"opencode works by tools, which {', '.join(plain)} cannot be offered")
    if access.ca:
        notes.append(f"start opencode with NODE_EXTRA_CA_CERTS={access.ca}")
    return notes
