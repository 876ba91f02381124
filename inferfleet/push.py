"""Hosts in parallel: ask what each has, then make the ones that differ as they should be.

One connection and one channel per host: the question, what a diff needs to be shown, and the
change all travel over it. A host that fails is a result among others; its siblings go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar

from inferfleet import transport, whoami, wire
from inferfleet.diff import diff
from inferfleet.errors import ApplyError, HostError
from inferfleet.model import Artefact, Bundle, Diff, Result, Snapshot

T = TypeVar("T")
R = TypeVar("R")
OnEvent = Callable[[str, dict[str, Any]], None]
WORKERS = 32


@dataclass
class Surveyed:
    """A host that answered: what it has, what would change, and the open channel to it."""

    bundle: Bundle
    snapshot: Snapshot
    diff: Diff
    way: transport.Transport
    session: transport.Session
    began: float
    _before: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.bundle.host.name

    def before(self) -> dict[str, bytes]:
        """Contents of the files that would change and are no secrets; asks the host once."""
        changed = {c.subject for c in self.diff.changes if c.kind == "update"}
        paths = [a.path for a in self.bundle.artefacts if a.path in changed and not a.secret]
        if paths and not self._before:
            self.session.send(wire.fetch(paths))
            self._before = wire.fetched(self.name, self.session.lines(timeout=60))
        return self._before

    def close(self) -> None:
        self.session.close()
        self.way.close()


def survey(bundle: Bundle, options: transport.Options) -> Surveyed:
    """Ask one host, in one round trip. Raises HostError."""
    began = time.monotonic()
    way = transport.connect(bundle.host, options)
    try:
        session = way.start(wire.BOOTSTRAP)
        session.send(wire.question(bundle))
        snapshot = wire.answer(bundle.host.name, session.lines(timeout=300))
    except BaseException:
        way.close()
        raise
    return Surveyed(bundle, snapshot, diff(bundle, snapshot), way, session, began)


def apply(surveyed: Surveyed, reason: str, on_event: OnEvent) -> Result:
    """Make one host as its bundle says, in one more round trip. Raises HostError."""
    restarts = 0
    if surveyed.diff.refused:
        raise refusal(surveyed)
    if surveyed.diff:
        request = wire.request(
            surveyed.bundle, surveyed.snapshot, owner=whoami.owner(), reason=reason
        )
        for block in request:
            surveyed.session.send(block)
        for event in wire.events(surveyed.name, surveyed.session.lines()):
            on_event(surveyed.name, event)
            restarts = event.get("restarts", restarts) if event["event"] == "done" else restarts
    surveyed.session.end()
    return Result(
        host=surveyed.name,
        status="changed" if surveyed.diff else "unchanged",
        changes=len(surveyed.diff.changes),
        restarts=restarts,
        seconds=time.monotonic() - surveyed.began,
        round_trips=surveyed.session.turns,
    )


def refusal(surveyed: Surveyed) -> ApplyError:
    """What is said of a host that the push must not touch."""
    return ApplyError(surveyed.name, "; ".join((*surveyed.diff.refused, "nothing was changed")))


def begin(
    things: Sequence[T], work: Callable[[T], R], workers: int = WORKERS
) -> dict[Future[R | HostError], T]:
    """`work` on every thing in parallel; a HostError is an outcome, not an end."""

    def guarded(thing: T) -> R | HostError:
        try:
            return work(thing)
        except HostError as error:
            return error

    pool = ThreadPoolExecutor(max(1, min(workers, len(things))))
    futures = {pool.submit(guarded, thing): thing for thing in things}
    pool.shutdown(wait=False)  # its threads end with the last of these
    return futures


def each(
    things: Sequence[T], work: Callable[[T], R], workers: int = WORKERS
) -> Iterator[tuple[T, R | HostError]]:
    """The outcomes of `work`, as they come; what has not begun when nobody asks on never does."""
    futures = begin(things, work, workers)
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def changed(surveyed: Surveyed) -> list[Artefact]:
    """The artefacts that would be written."""
    paths = {c.subject for c in surveyed.diff.changes if c.kind in ("create", "update")}
    return [a for a in surveyed.bundle.artefacts if a.path in paths]
