"""Shadowing: a share of requests is asked of another pool too, to compare before a cut-over.

Nobody waits for a copy's answer and nothing of it is kept but numbers.
"""

from __future__ import annotations

import asyncio
import difflib
import random
import statistics
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from inferfleet.gateway.pool import give_back

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from inferfleet.gateway.config import Config
    from inferfleet.gateway.core import Core
    from inferfleet.gateway.request import Request

KEPT = 1000  # comparisons a report is made from
AT_ONCE = 32  # copies under way; further ones are dropped
LONGEST = 1 << 20  # bytes of an answer that are compared
COMPARED = 2000  # characters of a text whose likeness is computed
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Said:
    """One answer; seconds from when it was asked."""

    body: bytearray = field(default_factory=bytearray)
    status: int = 0
    first_token: float = 0.0
    seconds: float = 0.0

    def keep(self, data: bytes) -> None:
        """Take in a part of the body."""
        if len(self.body) < LONGEST:
            self.body += data


@dataclass(frozen=True, slots=True)
class Compared:
    """The numbers of one pair of answers."""

    first_token: tuple[float, float]  # the client's, the copy's
    seconds: tuple[float, float]
    same_text: bool
    same_end: bool
    same_tools: bool
    likeness: float  # 0 to 1
    length: float  # characters, copy's by client's


class Copies:
    """The comparisons of one model with one pool."""

    def __init__(self, pool: str, percent: float) -> None:
        self.pool, self.percent = pool, percent
        self.asked = self.failed = self.dropped = 0
        self.compared: deque[Compared] = deque(maxlen=KEPT)

    def report(self) -> dict[str, Any]:
        """What an operator decides by: shares from 0 to 1, seconds."""
        pairs = list(self.compared)
        numbers = {"asked": self.asked, "failed": self.failed, "dropped": self.dropped}
        found: dict[str, Any] = {"pool": self.pool, "percent": self.percent, **numbers}
        found["compared"] = len(pairs)
        if not pairs:
            return found
        for name in ("same_text", "same_end", "same_tools"):
            found[name] = round(statistics.mean(getattr(p, name) for p in pairs), 4)
        for name in ("likeness", "length"):
            found[f"{name}_median"] = round(statistics.median(getattr(p, name) for p in pairs), 4)
        for name in ("first_token", "seconds"):
            found[name] = {
                side: quantiles([getattr(pair, name)[at] for pair in pairs])
                for at, side in enumerate(("clients", "copies"))
            }
        return found


class Shadows:
    """All shadowing of a worker."""

    def __init__(self, core: Core, config: Config) -> None:
        self.core = core
        self.copies = {
            name: Copies(model.shadow.pool, model.shadow.percent)
            for name, model in config.models.items()
            if model.shadow
        }
        self.running: set[asyncio.Task[None]] = set()

    def chosen(self, model: str) -> bool:
        """Whether this request is one of those to copy."""
        copies = self.copies.get(model)
        return copies is not None and random.random() * 100 < copies.percent  # noqa: S311

    def copy(self, model: str, request: Request, said: Said) -> None:
        """Ask the other pool too, and compare with what the client was told."""
        copies = self.copies[model]
        if len(self.running) >= AT_ONCE:
            copies.dropped += 1
            return
        copies.asked += 1
        task = asyncio.get_running_loop().create_task(self._compare(copies, request, said))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _compare(self, copies: Copies, request: Request, said: Said) -> None:
        try:
            async with asyncio.timeout(self.core.config.timeouts.whole):
                other = await self._ask(copies.pool, request)
        except (OSError, TimeoutError):
            other = None
        if other is None or other.status != 200:
            copies.failed += 1
        else:
            copies.compared.append(compare(said, other))

    async def _ask(self, name: str, request: Request) -> Said | None:
        pool, time = self.core.pools[name], self.core.time
        since = time()
        instance = pool.pick(0, since, ())
        if instance is None:
            return None
        instance.outstanding += 1
        said, answer = Said(), None
        try:
            call = request.call(pool.backend, pool.model)
            answer = await self.core.post(instance, call.path, call.body, {})
            said.status = answer.status
            while data := await answer.some():
                said.first_token = said.first_token or time() - since
                said.keep(call.shape.feed(data) if call.shape and request.stream else data)
            if call.shape and not request.stream:
                said.body = bytearray(call.shape.whole(bytes(said.body)))
        finally:
            if answer:
                answer.close()
            give_back(instance)
        said.seconds = time() - since
        return said

    def report(self) -> bytes:
        """All comparisons by model, as JSON."""
        return msgspec.json.encode({name: copies.report() for name, copies in self.copies.items()})


def listening_in(send: Send, said: Said) -> Send:
    """The same way to the client, with a copy of what goes there."""

    async def both(message: Message) -> None:
        said.keep(message.get("body", b""))
        await send(message)

    return both


def compare(ours: Said, theirs: Said) -> Compared:
    """The numbers of a pair."""
    (text, end, tools), (other, other_end, other_tools) = (
        gist(bytes(said.body)) for said in (ours, theirs)
    )
    likeness = difflib.SequenceMatcher(None, text[:COMPARED], other[:COMPARED], autojunk=False)
    return Compared(
        first_token=(ours.first_token, theirs.first_token),
        seconds=(ours.seconds, theirs.seconds),
        same_text=text == other,
        same_end=end == other_end,
        same_tools=tools == other_tools,
        likeness=1.0 if text == other else likeness.quick_ratio(),
        length=len(other) / len(text) if text else float(not other),
    )


def gist(body: bytes) -> tuple[str, str, int]:
    """Text, reason of the end and number of tools called, of an answer in any format."""
    text, end, tools = [], "", set()
    for document in documents(body):
        choice = (document.get("choices") or [document])[0]
        said = choice.get("delta") or choice.get("message") or choice
        text.append(said.get("content") or said.get("text") or said.get("response") or "")
        end = choice.get("finish_reason") or choice.get("done_reason") or end
        for at, call in enumerate(said.get("tool_calls") or ()):
            tools.add(call.get("index", at))
    return "".join(part for part in text if isinstance(part, str)), str(end), len(tools)


def documents(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a whole answer, of an event stream or of lines."""
    for line in body.splitlines():
        try:
            found = _decode(line.removeprefix(b"data:"))
        except msgspec.DecodeError:
            continue
        if isinstance(found, dict):
            yield found


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile (nearest rank), in seconds."""
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 4)
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }
