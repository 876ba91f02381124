"""Configurations for the clients of a phase: pure functions from an `Access` to text.

Each names the key's variable or reference in the client's own way, and never holds a key. What a
client cannot do with a phase is an Error, or a note where only a part of it is affected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from inferfleet.clients import cline, continuedev, curl, opencode, python, vscode
from inferfleet.clients.access import Access, Configuration, Endpoint, Served
from inferfleet.errors import Error, UsageError
from inferfleet.yamlbuild import did_you_mean

__all__ = ["CLIENTS", "Access", "Configuration", "Endpoint", "Served", "configuration"]

CLIENTS: Mapping[str, Callable[[Access], Configuration]] = {
    "vscode": vscode.configuration,
    "continue": continuedev.configuration,
    "cline": cline.configuration,
    "opencode": opencode.configuration,
    "openai": python.openai,
    "huggingface": python.huggingface,
    "ollama": python.ollama,
    "curl": curl.configuration,
}
_OWN_STORE = ("vscode", "continue")  # of keys; their notes say where


def configuration(client: str, access: Access) -> Configuration:
    """The configuration of a client, with what to know about the phase among its notes.

    Raises UsageError for an unknown client, Error where the phase is of no use to it.
    """
    if client not in CLIENTS:
        near = did_you_mean(client, CLIENTS)
        said = f"there is no client '{client}'{near}" if client else "for which client? Say --for"
        raise UsageError(f"{said}; known are {', '.join(CLIENTS)}")
    if not access.chats():
        raise Error(f"phase '{access.phase}' has no model that writes text, only embeddings")
    made = CLIENTS[client](access)
    notes = (*made.notes, *access.notes)
    if access.key and client not in _OWN_STORE:
        notes += (f"the key is not in here: it belongs into the variable {access.key}",)
    return replace(made, notes=notes)
