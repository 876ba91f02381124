"""Cline: the command for its own `cline auth`, and what to enter in its settings.

It keeps keys in a store of its own and reads no references, so there is no file to write.
"""

from __future__ import annotations

import shlex

from inferfleet.clients.access import Access, Configuration, Endpoint, Served

PLACE = "Cline's settings, or the command line for the one that `cline` starts"


def configuration(access: Access) -> Configuration:
    """One block for each model; the command lines differ only in their model."""
    blocks = [_block(access, *found) for found in access.chats()]
    return Configuration("\n".join(blocks), PLACE, tuple(_notes(access)))


def _block(access: Access, endpoint: Endpoint, model: Served) -> str:
    key = f"the key in {access.key}" if access.key else "none (anything but empty)"
    said = [
        "# Cline's settings (the gear), API Provider: OpenAI Compatible",
        f"#   Base URL:            {endpoint.base}",
        f"#   API Key:             {key}",
        f"#   Model ID:            {model.name}",
        f"#   Context Window Size: {model.context}",
        f"#   Max Output Tokens:   {model.output}",
        f"#   Supports Images:     {'yes' if model.vision else 'no'}",
    ]
    apikey = f'"${{{access.key}:?}}"' if access.key else "none"
    words = [shlex.quote(word) for word in ("--baseurl", endpoint.base, "--modelid", model.name)]
    line = f"cline auth --provider openai {' '.join(words)} --apikey {apikey}"
    return "\n".join([*said, line, ""])


def _notes(access: Access) -> list[str]:
    notes = ["the settings of Cline in VS Code and of the command `cline` are two"]
    if plain := access.without_tools():
        notes.append(f"Cline works by tools, which {', '.join(plain)} cannot be offered")
    if access.ca:
        notes.append(f"start Cline, or its editor, with NODE_EXTRA_CA_CERTS={access.ca}")
    return notes
