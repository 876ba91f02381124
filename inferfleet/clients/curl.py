"""One streamed chat request with curl, as a shell script."""

from __future__ import annotations

import json
import shlex

from inferfleet.clients.access import Access, Configuration, Endpoint, Served

PLACE = "a shell"


def configuration(access: Access) -> Configuration:
    """A request to each model that writes text."""
    lines = [line for found in access.chats() for line in _request(access, *found)]
    return Configuration("\n".join(lines) + "\n", PLACE)


def _request(access: Access, endpoint: Endpoint, model: Served) -> list[str]:
    body = {
        "model": model.name,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": min(64, model.output),
        "stream": True,
    }
    words = ["curl", "--fail-with-body", "--silent", "--show-error", "--no-buffer"]
    words += ["--cacert", access.ca] if access.ca else []
    # the key comes by standard input: on the command line, every user of the host can read it
    words += ["--header", "@-"] if access.key else []
    words += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
    line = shlex.join([*words, f"{endpoint.base}/chat/completions"])
    if not access.key:
        return [line]
    return [f"printf 'Authorization: Bearer %s\\n' \"${{{access.key}:?}}\" |", f"  {line}"]
