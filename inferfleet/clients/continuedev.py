"""Continue's config.yaml. Source: @continuedev/config-yaml, its schemas and validation."""

from __future__ import annotations

import re
from typing import Any

import yaml

from inferfleet.clients.access import Access, Configuration, Endpoint, Served

PLACE = "~/.continue/config.yaml"
_COMPLETES = re.compile(r"coder|codestral|starcoder|codegemma|codellama|granite-code")


def configuration(access: Access) -> Configuration:
    """Models for chat, edit and apply; for autocomplete and embeddings where there are such."""
    models = [_chat(access, *found) for found in access.chats()]
    models += [_autocomplete(access, *f) for f in access.chats() if _COMPLETES.search(f[1].name)]
    models += [_embed(access, *found) for found in access.embedders()]
    whole = {
        "name": f"inferfleet {access.phase}",
        "version": "1.0.0",
        "schema": "v1",
        "models": models,
    }
    text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True, width=100)
    return Configuration(text, PLACE, tuple(_notes(access)))


def _base(access: Access, endpoint: Endpoint, model: Served, what: str) -> dict[str, Any]:
    own = model.name if endpoint.name == f"inferfleet-{access.phase}" else endpoint.name
    return {
        "name": f"{own} {what}".rstrip(),
        "provider": "openai",
        "model": model.name,
        "apiBase": endpoint.base,
        **({"apiKey": f"${{{{ secrets.{access.key} }}}}"} if access.key else {}),
        **({"requestOptions": {"caBundlePath": access.ca}} if access.ca else {}),
    }


def _chat(access: Access, endpoint: Endpoint, model: Served) -> dict[str, Any]:
    # said even when empty: Continue guesses by the model's name otherwise
    can = {"tool_use": model.tools, "image_input": model.vision}
    return {
        **_base(access, endpoint, model, ""),
        "roles": ["chat", "edit", "apply", "summarize"],
        "capabilities": [name for name, able in can.items() if able],
        "defaultCompletionOptions": {"contextLength": model.context, "maxTokens": model.output},
    }


def _autocomplete(access: Access, endpoint: Endpoint, model: Served) -> dict[str, Any]:
    return {
        **_base(access, endpoint, model, "autocomplete"),
        "roles": ["autocomplete"],
        "useLegacyCompletionsEndpoint": True,  # the text before and after, not a chat
    }


def _embed(access: Access, endpoint: Endpoint, model: Served) -> dict[str, Any]:
    return {**_base(access, endpoint, model, ""), "roles": ["embed"]}


def _notes(access: Access) -> list[str]:
    notes = []
    if access.key:
        notes.append(f"Continue reads {access.key}=... from ~/.continue/.env")
    if plain := access.without_tools():
        notes.append(f"no tools with {', '.join(plain)}: Continue's agent mode is off for it")
    return notes
