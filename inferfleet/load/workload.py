"""What is asked: prompts that differ from their first word on, answers of a given length. Pure."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

Api = Literal["openai", "ollama"]
PATHS: dict[Api, str] = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}

_WORDS = (  # noqa: SIM905 - a list of strings would take a page
    "time year way day man thing life child world school state family group hand part place "
    "case week work fact home water room area money story month lot right study book eye job "
    "word side kind head house page line city name team hour game level door art war car food"
).split()  # short and common: about one token each with every tokenizer
_SPREAD = 4  # so many times the words of a prompt, of which each prompt is a part
_ASK = "Write a long story in which all of these words occur, and do not stop early."


@dataclass(frozen=True, slots=True)
class Workload:
    """The method's parameters. Lengths are tokens; `words` are what the prompt's length takes."""

    prompt_tokens: int = 512
    output_tokens: int = 128
    shared_prefix: int = 0  # tokens of a beginning that all prompts have in common
    ignore_eos: bool = False  # vLLM's own field: the answer always has its full length
    words: int = 512

    def part(self, share: int) -> Workload:
        """One in `share` of the words."""
        return replace(self, words=max(1, self.words // share))

    def calibrated(self, first: tuple[int, int | None], second: tuple[int, int | None]) -> Workload:
        """The words for the wanted length, by two (words, tokens) that the server counted.

        Length is linear in words; what the chat template adds stays as it is. No tokenizer makes
        less than half a token of a word: a count that says so left out what was cached.
        """
        (many, most), (few, least) = first, second
        if most is None or least is None or many <= few or most - least < (many - few) / 2:
            return self
        each = (most - least) / (many - few)
        return replace(self, words=max(1, round(many + (self.prompt_tokens - most) / each)))


@dataclass(frozen=True, slots=True)
class Method:
    """How it is measured; `requests` of a round, or its `seconds`."""

    workload: Workload = Workload()
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds: float = 20.0
    requests: int = 0
    repeats: int = 1
    timeout: float = 300.0  # seconds of one request


class Prompts:
    """Prompts of one run. `run` sets them apart from every other run's in a prefix cache."""

    def __init__(self, workload: Workload, run: str) -> None:
        self._run, self._number = run, 0
        shared = min(workload.words, workload.shared_prefix)
        self._shared = " ".join(_words(0, shared))
        self._own = workload.words - shared
        self._words = _words(1, self._own * _SPREAD)

    def next(self) -> str:
        """Like no other prompt from the first word after the shared beginning on."""
        self._number += 1
        start = self._number * 7 % max(1, self._own * (_SPREAD - 1))
        words = " ".join(self._words[start : start + self._own])
        return f"{self._shared}\n{self._run}-{self._number}: {words}\n{_ASK}".lstrip()


def _words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)  # noqa: S311 - words, no secret


def body(api: Api, model: str, prompt: str, workload: Workload, limit: int | None = None) -> bytes:
    """The request, JSON; `limit` tokens of answer in place of the workload's."""
    wanted = workload.output_tokens if limit is None else limit
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
    }
    if api == "ollama":
        asked["options"] = {"num_predict": wanted, "temperature": 0}
    else:
        asked |= {"max_tokens": wanted, "temperature": 0}
        asked["stream_options"] = {"include_usage": True}
        if workload.ignore_eos:
            asked["ignore_eos"] = True
    return json.dumps(asked).encode()
