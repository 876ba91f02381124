"""VS Code's chatLanguageModels.json: models of one's own in its chat (1.122 and newer).

Source: extensions/copilot/.../customEndpointProvider.ts and languageModels.ts of microsoft/vscode.
"""

from __future__ import annotations

import json
from typing import Any

from inferfleet.clients.access import Access, Configuration, Endpoint, Served

PLACE = "chatLanguageModels.json (command 'Chat: Open Language Models (JSON)')"


def configuration(access: Access) -> Configuration:
    """An array with one group for each base URL, since a group's models need ids of their own."""
    groups = [_group(endpoint, access.key) for endpoint in access.endpoints if _chats(endpoint)]
    text = json.dumps(groups, indent=2, ensure_ascii=False) + "\n"
    return Configuration(text, PLACE, tuple(_notes(access, groups)), merge="vscode")


def _group(endpoint: Endpoint, key: str) -> dict[str, Any]:
    # VS Code looks the name up in its secret storage; a key in clear it would not even use
    secret = {"apiKey": f"${{input:chat.lm.secret.{endpoint.name}}}"} if key else {}
    return {
        "name": endpoint.name,
        "vendor": "customendpoint",
        **secret,
        "apiType": "chat-completions",
        "models": [_model(endpoint, model) for model in _chats(endpoint)],
    }


def _model(endpoint: Endpoint, model: Served) -> dict[str, Any]:
    return {
        "id": model.name,
        "name": model.name,
        "url": f"{endpoint.base}/chat/completions",
        "toolCalling": model.tools,
        "vision": model.vision,
        "maxInputTokens": model.input,
        "maxOutputTokens": model.output,
    }


def _chats(endpoint: Endpoint) -> list[Served]:
    return [model for model in endpoint.models if not model.embeddings]


def _notes(access: Access, groups: list[dict[str, Any]]) -> list[str]:
    notes = []
    if hidden := access.without_tools():
        notes.append(
            f"agent mode hides {', '.join(hidden)}: its engine offers no tools (vLLM needs"
            " tool_call_parser); chat without agents works"
        )
    if access.key:
        names = ", ".join(f"'{group['name']}'" for group in groups)
        notes.append(
            "VS Code keeps the key itself: 'Chat: Manage Language Models', Add Models, Custom"
            f" Endpoint, group name {names}, enter the key; --write then keeps its reference"
        )
    if access.ca:
        notes.append(
            f"add {access.ca} to the system's certificates, which VS Code reads, or start it with"
            f" NODE_EXTRA_CA_CERTS={access.ca}"
        )
    return notes
