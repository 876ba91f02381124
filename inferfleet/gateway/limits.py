"""How much each key may ask: requests a minute, requests at once, tokens a day (UTC).

Every worker counts for itself, so each is given its part of a key's limits: the limit divided
by the number of workers, rounded up, so that none locks a key out. A key whose connections all
fall to one worker gets that part and no more.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from inferfleet.gateway.keys import Key

_LOG = logging.getLogger("inferfleet.gateway")
_DAY = 86400
_BURST_SECONDS = 10
_LEAST_BURST = 5  # what an editor sends when it opens


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in, and after how many seconds (1 or more) to try again."""

    message: str
    retry_after: int
    code: Literal["rate", "concurrency", "budget"]


class _Use:
    """What one key has used, in this worker."""

    __slots__ = ("allowance", "at", "day", "running", "tokens", "unsaved")

    def __init__(self, now: float) -> None:
        self.allowance = math.inf  # full; the first request cuts it to the key's burst
        self.at = now  # when allowance was counted
        self.running = 0
        self.day = int(now // _DAY)
        self.tokens = 0  # of that day
        self.unsaved = 0  # those of them that the file does not hold

    def turn(self, day: int) -> None:
        if day != self.day:
            self.day, self.tokens, self.unsaved = day, 0, 0

    def take(self, requests_per_minute: int, workers: int, now: float) -> float:
        """Takes one request off the allowance: 0, or the seconds until there is one to take."""
        rate = requests_per_minute / workers / 60
        full = max(1.0, _burst(requests_per_minute) / workers)
        # a clock that was set back must not take from the allowance
        self.allowance = min(full, self.allowance + max(0.0, now - self.at) * rate)
        self.at = now
        if self.allowance < 1:
            return (1 - self.allowance) / rate
        self.allowance -= 1
        return 0.0


class _Saved(msgspec.Struct):
    day: int  # days since 1970
    tokens: dict[str, int]


class Limits:
    """The counts of all keys by name, so they outlive a change of the keys file.

    `now` is always seconds since 1970, as `time.time()` gives them.
    """

    def __init__(self, workers: int = 1) -> None:
        self._workers = workers
        self._uses: dict[str, _Use] = {}

    def admit(self, key: Key, now: float) -> Refusal | None:
        """None: the request may run, and `release` must follow. A refused one counts nowhere."""
        use = self._uses.get(key.name)
        if use is None:
            use = self._uses[key.name] = _Use(now)
        if key.tokens_per_day is not None:
            use.turn(int(now // _DAY))
            if use.tokens >= -(-key.tokens_per_day // self._workers):
                return _spent(key.tokens_per_day, now)
        if key.concurrency is not None and use.running >= -(-key.concurrency // self._workers):
            return _crowded(key.concurrency)
        if key.requests_per_minute is not None:
            wait = use.take(key.requests_per_minute, self._workers, now)
            if wait:
                return _too_fast(key.requests_per_minute, wait)
        use.running += 1
        return None

    def release(self, key: Key, tokens: int, now: float) -> None:
        """The request that was admitted has ended and used so many tokens, prompt and answer."""
        use = self._uses[key.name]
        use.running -= 1
        use.turn(int(now // _DAY))
        use.tokens += tokens
        use.unsaved += tokens

    def usage(self, now: float) -> dict[str, dict[str, int]]:
        """By key name, for people: `running` requests and `tokens_today`, in this worker."""
        day = int(now // _DAY)
        return {
            name: {"running": use.running, "tokens_today": use.tokens if use.day == day else 0}
            for name, use in sorted(self._uses.items())
        }

    def load(self, path: Path, now: float) -> None:
        """Takes up the day's tokens of this worker's place from its file, if there is one."""
        self._adopt(_saved(path, int(now // _DAY)), now)

    def save(self, path: Path, now: float) -> None:
        """Adds what was used since the last time to the file of this worker's place.

        While a reload drains the worker that had the place before, both count into the file and
        learn of each other's tokens here. Raises OSError.
        """
        with _locked(path.parent):
            saved = _saved(path, int(now // _DAY))
            for name, use in self._uses.items():
                use.turn(saved.day)
                if use.unsaved:
                    saved.tokens[name] = saved.tokens.get(name, 0) + use.unsaved
            _replace(path, msgspec.json.encode(saved))
        for use in self._uses.values():
            use.unsaved = 0
        self._adopt(saved, now)

    def _adopt(self, saved: _Saved, now: float) -> None:
        for name, tokens in saved.tokens.items():
            use = self._uses.setdefault(name, _Use(now))
            use.turn(saved.day)
            use.tokens = tokens + use.unsaved


def _burst(requests_per_minute: int) -> float:
    """How many may come at once: ten seconds' worth, but a few even where the rate is small."""
    return max(requests_per_minute * _BURST_SECONDS / 60, min(requests_per_minute, _LEAST_BURST))


def _spent(limit: int, now: float) -> Refusal:
    left = math.ceil(_DAY - now % _DAY)
    return Refusal(f"the {limit} tokens of this key's day are spent", max(1, left), "budget")


def _crowded(limit: int) -> Refusal:
    return Refusal(f"this key may have {limit} requests at once", 1, "concurrency")


def _too_fast(limit: int, wait: float) -> Refusal:
    return Refusal(f"this key may send {limit} requests a minute", math.ceil(wait), "rate")


def _saved(path: Path, day: int) -> _Saved:
    """What the file holds of this day; an unreadable one must not keep the gateway down."""
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
    except FileNotFoundError:
        return _Saved(day, {})
    except (OSError, msgspec.DecodeError) as error:
        _LOG.error("%s: %s; the day's token counts begin at zero", path, error)
        return _Saved(day, {})
    return saved if saved.day == day else _Saved(day, {})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)
