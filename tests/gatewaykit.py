"""Clients that keep asking while something is done to what answers them."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MODEL = "qwen2.5-coder"
PROMPT = "token-" * 400  # the simulator says it back, in six characters a token


@dataclass(frozen=True)
class Door:
    """Where clients come in, by TLS, with a key."""

    address: str
    certificate: Path
    key: str

    def ask(
        self, path: str, body: object = None, key: str | None = None, **headers: str
    ) -> tuple[int, list[str], dict[str, str]]:
        """Status, lines that are not empty and headers of an answer; GET without a body."""
        trusted = ssl.create_default_context(cafile=str(self.certificate))
        connection = http.client.HTTPSConnection(self.address, timeout=60, context=trusted)
        sent = {"Authorization": f"Bearer {key or self.key}", **headers}
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, sent | {"Content-Type": "application/json"})
        answer = connection.getresponse()
        lines = [line.decode().strip() for line in answer if line.strip()]
        connection.close()
        return answer.status, lines, {k.lower(): v for k, v in answer.getheaders()}

    def chat(self, tokens: int, **more: object) -> tuple[int, list[str]]:
        """Status and lines of a chat that streams `tokens` tokens."""
        messages = [{"role": "user", "content": PROMPT}]
        body = {"model": MODEL, "messages": messages, "stream": True, "max_tokens": tokens}
        return self.ask("/v1/chat/completions", body | more)[:2]


@dataclass
class Load:
    """What many clients got meanwhile: how many answers were whole, and all that were not."""

    whole: int = 0
    broken: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def client(self, door: Door, tokens: int) -> None:
        while not self.over.is_set():
            began = time.monotonic()
            try:
                status, lines = door.chat(tokens)
            except (OSError, http.client.HTTPException) as error:
                self.broken.append(f"{error!r} after {time.monotonic() - began:.2f} s")
                continue
            if status == 200 and lines[-1] == "data: [DONE]":
                self.whole += 1
            else:
                self.broken.append(f"{status} {lines[-1][:200] if lines else ''}")


@contextmanager
def load(door: Door, clients: int, tokens: int) -> Iterator[Load]:
    """Half of the clients ask for long streams, the others for a token again and again."""
    found = Load()
    lengths = [tokens if number % 2 else 1 for number in range(clients)]
    threads = [threading.Thread(target=found.client, args=(door, n)) for n in lengths]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.over.set()
        for thread in threads:
            thread.join(60)
