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
from inferfleet.gateway.request import BadRequest

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from inferfleet.gateway.config import Config
    from inferfleet.gateway.core import Core
    from inferfleet.gateway.metrics import ShadowSeries
    from inferfleet.gateway.request import Request

KEPT = 1000  # comparisons a report is made from
AT_ONCE = 32  # copies under way; further ones are dropped
LONGEST = 1 << 20  # bytes of an answer that are compared
COMPARED = 2000  # characters of a text whose likeness is computed
_decode = msgspec.json.Decoder().decode
Gist = tuple[str, str, tuple[str, ...]]  # text, reason of the end, names of the tools called
NOTHING: Gist = ("", "", ())


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

    def __init__(self, pool: str, percent: float, series: ShadowSeries) -> None:
        self.pool, self.percent, self.series = pool, percent, series
        self.asked = self.failed = self.dropped = 0
        self.failure = ""  # why the last one failed
        self.compared: deque[Compared] = deque(maxlen=KEPT)

    def fail(self, why: str) -> None:
        """A copy that brought nothing to compare."""
        self.failed += 1
        self.failure = why
        self.series.outcomes["failed"] += 1

    def drop(self) -> None:
        """A copy too many."""
        self.dropped += 1
        self.series.outcomes["dropped"] += 1

    def keep(self, compared: Compared) -> None:
        """A comparison; the oldest give way."""
        self.compared.append(compared)
        self.series.outcomes["answered"] += 1
        self.series.seconds.observe(compared.seconds[1])

    def report(self, samples: bool) -> dict[str, Any]:
        """What an operator decides by: shares from 0 to 1, seconds.

        With `samples`, the comparisons themselves, so that those of many workers can be merged.
        """
        pairs = list(self.compared)
        numbers = {"asked": self.asked, "failed": self.failed, "dropped": self.dropped}
        found: dict[str, Any] = {"pool": self.pool, "percent": self.percent, **numbers}
        found |= {"failure": self.failure, "compared": len(pairs)}
        if samples:
            return {**found, "samples": pairs}
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
            name: Copies(
                model.shadow.pool,
                model.shadow.percent,
                core.metrics.shadow(name, model.shadow.pool),
            )
            for name, model in config.models.items()
            if model.shadow
        }
        self.running: set[asyncio.Task[None]] = set()

    def chosen(self, model: str) -> bool:
        """Whether this request is one of those to copy."""
        copies = self.copies.get(model)
        return copies is not None and random.random() * 100 < copies.percent  # noqa: S311

    def copy(self, model: str, pool: str, request: Request, said: Said) -> None:
        """Ask the other pool too, and compare with what the client was told by `pool`.

        What the other pool itself answered says nothing, nor do answers that are no text.
        """
        copies = self.copies[model]
        if pool == copies.pool:
            return
        if len(self.running) >= AT_ONCE:
            copies.drop()
            return
        task = asyncio.get_running_loop().create_task(self._compare(copies, request, said))
        self.running.add(task)
        task.add_done_callback(self.running.discard)

    async def _compare(self, copies: Copies, request: Request, said: Said) -> None:
        if (ours := gist(bytes(said.body))) == NOTHING:
            return
        copies.asked += 1
        try:
            async with asyncio.timeout(self.core.config.timeouts.whole):
                other = await self._ask(copies.pool, request)
        except (BadRequest, OSError, TimeoutError, msgspec.DecodeError) as error:
            copies.fail(str(error) or type(error).__name__)
            return
        if other is None:
            copies.fail("none of its instances can be asked")
        elif other.status != 200:
            copies.fail(f"status {other.status}")
        else:
            copies.keep(compare(said, ours, other))

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
            shape = call.shape if answer.status == 200 else None
            while data := await answer.some():
                said.first_token = said.first_token or time() - since
                said.keep(shape.feed(data) if shape and request.stream else data)
            if shape and request.stream:
                said.keep(shape.end())
            elif shape:
                said.body = bytearray(shape.whole(bytes(said.body)))
        finally:
            if answer:
                answer.close()
            give_back(instance)
        said.seconds = time() - since
        return said

    def report(self, samples: bool) -> bytes:
        """All comparisons by model, as JSON."""
        found = {name: copies.report(samples) for name, copies in self.copies.items()}
        return msgspec.json.encode(found)


def listening_in(send: Send, said: Said) -> Send:
    """The same way to the client, with a copy of what goes there."""

    async def both(message: Message) -> None:
        said.keep(message.get("body", b""))
        await send(message)

    return both


def compare(said: Said, ours: Gist, other: Said) -> Compared:
    """The numbers of a pair; `ours` is the gist of what the client was told."""
    (text, end, tools), (their_text, their_end, their_tools) = ours, gist(bytes(other.body))
    likeness = difflib.SequenceMatcher(None, text[:COMPARED], their_text[:COMPARED], autojunk=False)
    return Compared(
        first_token=(said.first_token, other.first_token),
        seconds=(said.seconds, other.seconds),
        same_text=text == their_text,
        same_end=end == their_end,
        same_tools=tools == their_tools,
        likeness=1.0 if text == their_text else likeness.quick_ratio(),
        length=len(their_text) / len(text) if text else float(not their_text),
    )


def gist(body: bytes) -> Gist:
    """Text, reason of the end and tools called, of an answer in any format."""
    text: list[str] = []
    end, tools = "", set()
    for each in documents(body):
        choice = mapping(each.get("choices")) or each
        said = choice.get("delta") or choice.get("message") or choice
        text += words(said)
        part = mapping(said) or choice
        end = (
            choice.get("finish_reason")
            or choice.get("done_reason")
            or part.get("stop_reason")
            or end
        )
        calls = part.get("tool_calls")
        for at, call in enumerate(calls if isinstance(calls, list) else ()):
            if name := mapping(mapping(call).get("function")).get("name"):
                tools.add((str(mapping(call).get("index", at)), str(name)))
    return "".join(text), str(end), tuple(name for _, name in sorted(tools))


def mapping(found: Any) -> dict[str, Any]:
    """A JSON object, or the first of a list of them; else an empty one."""
    if isinstance(found, list) and found:
        found = found[0]
    return found if isinstance(found, dict) else {}


def words(said: Any) -> Iterator[str]:
    """The text in a part of an answer, wherever its format puts it."""
    if isinstance(said, str):
        yield said
    elif isinstance(said, list):
        for part in said:
            yield from words(part)
    elif isinstance(said, dict):
        for name in ("content", "text", "response", "output"):
            yield from words(said.get(name))


def documents(body: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects of a whole answer, of an event stream or of lines."""
    if whole := document(body):
        yield whole
        return
    for line in body.splitlines():
        yield document(line.removeprefix(b"data:"))


def document(text: bytes | bytearray) -> dict[str, Any]:
    """The JSON object that a text is; else an empty one."""
    try:
        found = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile (nearest rank), in seconds."""
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 4)
        for name, share in (("p50", 0.5), ("p95", 0.95))
    }
