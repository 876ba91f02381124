"""Clients that ask for tokens in every API and check each byte of what they get."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp

from storm.site import MODEL, Site

PATIENCE = 150  # seconds after which a client has waited in vain
PROGRAM = Path(__file__).parents[2] / "roles/simulator/simulator.py"


def simulator() -> ModuleType:
    """The engine's own program: what it says to a prompt is known beforehand."""
    spec = importlib.util.spec_from_file_location("simulator", PROGRAM)
    assert spec
    assert spec.loader
    module = sys.modules["simulator"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(slots=True)
class Told:
    """What one client got. `end`: whole, cut (and told so), broken (in silence) or failed."""

    kind: str
    began: float  # of time.monotonic
    seconds: float = 0.0
    first: float = 0.0  # seconds until the answer began
    status: int = 0
    end: str = "failed"
    wrong: str = ""  # what no answer may be


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to ask; `read` gives the text of complete events, and how the stream ended."""

    path: str
    stream: bool
    body: Callable[[str, int], dict[str, Any]]
    read: Callable[[bytes], tuple[str, str]]


def _chat(prompt: str, limit: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit}


def _completion(prompt: str, limit: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": limit}


def _ollama(prompt: str, limit: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "options": {"num_predict": limit}}


def _generate(prompt: str, limit: int) -> dict[str, Any]:
    return {"prompt": prompt, "options": {"num_predict": limit}}


def _whole_openai(body: bytes) -> tuple[str, str]:
    choice = json.loads(body)["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"], "whole"


def _whole_ollama(body: bytes) -> tuple[str, str]:
    found = json.loads(body)
    return found["message"]["content"], "whole" if found["done"] else "silent"


def events(body: bytes) -> tuple[str, str]:
    """The text of server-sent events, and whether they ended well, with an error, or not."""
    text, end = "", "silent"
    *complete, rest = body.split(b"\n\n")
    for event in complete:
        if end != "silent":
            raise ValueError("events after the last one")
        if event == b"data: [DONE]":
            end = "whole"
            continue
        found = json.loads(event.removeprefix(b"data: "))
        if "error" in found:
            end = "cut"
        for choice in found.get("choices", ()):
            text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
    if rest and end == "silent":
        end = "half"
    return text, end


def lines(body: bytes) -> tuple[str, str]:
    """The same of Ollama's lines."""
    text, end = "", "silent"
    *complete, rest = body.split(b"\n")
    for line in complete:
        if end != "silent":
            raise ValueError("lines after the last one")
        found = json.loads(line)
        if "error" in found:
            end = "cut"
            continue
        text += found["message"]["content"] if "message" in found else found["response"]
        end = "whole" if found["done"] else end
    return text, "half" if rest and end == "silent" else end


KINDS = {
    "openai chat, streamed": Kind("/v1/chat/completions", True, _chat, events),
    "openai chat": Kind("/v1/chat/completions", False, _chat, _whole_openai),
    "openai completion, streamed": Kind("/v1/completions", True, _completion, events),
    "openai completion": Kind("/v1/completions", False, _completion, _whole_openai),
    "ollama chat, streamed": Kind("/api/chat", True, _ollama, lines),
    "ollama chat": Kind("/api/chat", False, _ollama, _whole_ollama),
    "ollama generate, streamed": Kind("/api/generate", True, _generate, lines),
}


@dataclass
class Load:
    """Many clients, each asking again once it has been answered."""

    site: Site
    rng: random.Random
    told: list[Told] = field(default_factory=list)
    over: bool = False

    def __post_init__(self) -> None:
        self._engine = simulator()

    async def run(self, clients: int) -> None:
        """Ask until `over`, and then until all are answered."""
        trusted = ssl.create_default_context(cafile=str(self.site.certificate))
        async with aiohttp.ClientSession(
            self.site.door,
            headers={"Authorization": f"Bearer {self.site.key}"},
            connector=aiohttp.TCPConnector(ssl=trusted, limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        ) as session:
            await asyncio.gather(*(self._client(session) for _ in range(clients)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self.over:
            name = self.rng.choice(list(KINDS))
            prompt = " ".join("w" * self.rng.randint(1, 90) for _ in range(self.rng.randint(1, 14)))
            limit = self.rng.choice((1, 20, 60, 200))
            self.told.append(await self._ask(session, name, prompt, limit))
            await asyncio.sleep(self.rng.random() * 0.1)

    async def _ask(
        self, session: aiohttp.ClientSession, name: str, prompt: str, limit: int
    ) -> Told:
        kind, told = KINDS[name], Told(name, time.monotonic())
        body = {"model": MODEL, "stream": kind.stream, **kind.body(prompt, limit)}
        got = bytearray()
        try:
            async with session.post(kind.path, json=body) as answer:
                told.status, told.first = answer.status, time.monotonic() - told.began
                async for data in answer.content.iter_any():
                    got += data
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            told.end = "broken" if told.status else "failed"
            told.wrong = "" if told.status else repr(error)
        told.seconds = time.monotonic() - told.began
        self._judge(told, kind, bytes(got), self._expected(prompt, limit))
        return told

    def _expected(self, prompt: str, limit: int) -> str:
        text = self._engine.answer_text(MODEL, prompt)
        return "".join(self._engine.TOKEN.findall(text)[:limit])

    def _judge(self, told: Told, kind: Kind, body: bytes, expected: str) -> None:
        broken = told.end == "broken"
        if told.status != 200:
            told.wrong = told.wrong or f"status {told.status}: {body[:200]!r}"
        if told.wrong or (broken and not kind.stream):
            return
        try:
            text, end = kind.read(body)
        except (ValueError, KeyError) as error:
            told.wrong = f"{error!r} in {body[-200:]!r}"
            return
        told.end = "broken" if broken else end
        if end in ("silent", "half") and not broken:
            told.wrong = f"the stream ended without a word: {body[-200:]!r}"
        elif text != expected[: len(text)] or (end == "whole" and text != expected):
            told.wrong = f"{text[-80:]!r} is not how {expected!r} goes on"
