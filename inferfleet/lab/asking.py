"""One request as a client of a demo sends it, printed as the answer comes."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inferfleet.errors import Error

MODEL = "qwen2.5-coder"
_ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Write a haiku about GPUs."}],
    "stream": True,
}


def openai(base: str, key: str, authority: Path | None) -> None:
    """A chat completion of OpenAI's API; `base` ends in /v1. Raises Error for any other answer."""
    body = {**_ASKED, "max_tokens": 40}
    print("  ", end="")
    for line in _lines(f"{base}/chat/completions", body, key, authority):
        if line.startswith(b"data: {"):
            delta = json.loads(line[6:])["choices"][0]["delta"]
            print(delta.get("content") or "", end="", flush=True)
    print()


def ollama(base: str, key: str, authority: Path | None) -> None:
    """A chat of Ollama's API. Raises Error for any other answer."""
    body = {**_ASKED, "options": {"num_predict": 40}}
    print("  ", end="")
    for line in _lines(f"{base}/api/chat", body, key, authority):
        event = json.loads(line)
        print(event["message"]["content"], end="", flush=True)
        if event["done"]:
            print(f"\n  (Ollama's last line counts {event['eval_count']} tokens)")


def _lines(url: str, body: dict[str, Any], key: str, authority: Path | None) -> Iterator[bytes]:
    parts = urlsplit(url)
    trusted = ssl.create_default_context(cafile=str(authority)) if authority else None
    connection = (
        http.client.HTTPSConnection(parts.netloc, timeout=30, context=trusted)
        if trusted
        else http.client.HTTPConnection(parts.netloc, timeout=30)
    )
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", parts.path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise Error(f"{url} answered {answer.status}: {answer.read()[:300]!r}")
        yield from answer
    finally:
        connection.close()
