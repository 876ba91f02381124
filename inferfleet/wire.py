"""What is said to a host: pure, over one channel, in at most two round trips.

    BOOTSTRAP   a shell that reads `WORD SIZE` and then SIZE bytes, again and again
    question    WORD "sh": a script that only looks; `answer` reads what it prints
    request     WORD "python": the applier, one JSON line, the blobs; `events` reads what it prints

Only a change needs python3 on the host.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from importlib import resources
from typing import Any

from inferfleet.errors import ApplyError
from inferfleet.model import Artefact, Bundle, Ensure, FileState, Snapshot, sh
from inferfleet.probe import answer, fetch, fetched, framed, question

__all__ = [
    "BOOTSTRAP",
    "answer",
    "applier_source",
    "events",
    "fetch",
    "fetched",
    "question",
    "request",
]

OLDEST_PYTHON = (3, 8)

_LOADER = "import sys;exec(sys.stdin.buffer.read(int(sys.argv[1])))"

# dd, since neither it nor `read` takes more bytes than asked (the Rust `head -c` does). No newline,
# backslash or exclamation mark: the login shell that reads this may be fish or csh.
BOOTSTRAP = sh(
    "sh",
    "-c",
    "umask 077; while read -r word size; do case $word in "
    'sh) eval "$(dd bs="$size" count=1 iflag=fullblock 2>/dev/null)";; '
    f'python) exec python3 -I -S -X utf8 -c "{_LOADER}" "$size";; '
    "esac; done",
)


_LOAD = """import sys, types
def load(name, source):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
"""


@functools.cache
def applier_source() -> bytes:
    """The modules of `inferfleet.applier` as one Python source, which runs only as a whole."""
    folder = resources.files("inferfleet.applier")
    loads = [
        f"load('inferfleet.applier.{name}', {folder.joinpath(name + '.py').read_text('utf-8')!r})\n"
        for name in ("disk", "commands", "guard", "manifest", "transaction", "apply")
    ]
    end = "sys.exit(sys.modules['inferfleet.applier.apply'].main())\n"
    return "".join([_LOAD, *loads, end]).encode()


def request(bundle: Bundle, snapshot: Snapshot, *, owner: str, reason: str) -> Iterator[bytes]:
    """What makes a host as `bundle` says: the applier, one JSON line, the blobs that differ.

    `owner` and `reason` are what others read in the lock. Contents travel in blobs alone.
    Raises ApplyError when the host has no python3 that could do it.
    """
    _require_python(snapshot)
    blobs = _blobs(bundle, snapshot)
    wanted = {
        "phase": bundle.phase,
        "owner": owner,
        "reason": reason,
        "generation": snapshot.generation,
        "expect": {a.path: _expected(snapshot, a.path) for a in bundle.artefacts},
        "parts": [_part(role, part) for role, part in bundle.parts],
        "blobs": [[digest, len(content)] for digest, content in blobs.items()],
    }
    yield framed("python", applier_source())
    yield json.dumps(wanted).encode() + b"\n"
    yield from blobs.values()


def _require_python(snapshot: Snapshot) -> None:
    if not snapshot.python:
        raise ApplyError(snapshot.host, "it has no python3; install it (Debian: python3-minimal)")
    if tuple(map(int, snapshot.python.split("."))) < OLDEST_PYTHON:
        oldest = "{}.{}".format(*OLDEST_PYTHON)
        raise ApplyError(
            snapshot.host, f"its python3 is {snapshot.python}; {oldest} or newer is needed"
        )


def _blobs(bundle: Bundle, snapshot: Snapshot) -> dict[str, bytes]:
    """Contents by digest that the host lacks; all of them when what it has may be undone first."""
    return {
        artefact.digest: artefact.content
        for artefact in bundle.artefacts
        if snapshot.interrupted or _expected(snapshot, artefact.path) != artefact.digest
    }


def _expected(snapshot: Snapshot, path: str) -> str:
    state = snapshot.files.get(path, FileState(path))
    return state.digest or state.kind


def _part(role: str, part: Iterable[Artefact | Ensure]) -> dict[str, Any]:
    pieces = tuple(part)
    return {
        "role": role,
        "files": [_wanted(piece) for piece in pieces if isinstance(piece, Artefact)],
        "ensures": [asdict(piece) for piece in pieces if isinstance(piece, Ensure)],
    }


def _wanted(artefact: Artefact) -> dict[str, Any]:
    wanted = {field.name: getattr(artefact, field.name) for field in fields(artefact)}
    del wanted["content"], wanted["secret"]
    return {**wanted, "sha256": artefact.digest}


def events(host: str, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The applier's events as they come, to "done". Each has "event", and for

        recovered  how: "finished" or "undone", a former run that was cut short
        ensure     title, state: "running", "ok", "failed"
        output     title, line: what the command of an ensure that runs printed last
        check      argv: the validator that runs
        stage      path; a file lies beside its target, not yet in place
        remove     path
        unit       unit, verb: "restart", "reload", "stop" or, of itself, "daemon-reload";
                   state: those of ensure, or "gone" for a unit that is no more
        left_out   validators, ensures, units: what is not done on a host that is a folder
        failed     message; ApplyError follows
        done       changes, restarts: how many

    Raises ApplyError also when the lines end before one of the last two.
    """
    doing = "starting the applier"
    for line in lines:
        event = _event(host, line)
        yield event
        if event["event"] == "failed":
            raise ApplyError(host, event["message"])
        if event["event"] == "done":
            return
        doing = _DOING.get(event["event"], "applying").format_map(event)
    raise ApplyError(host, f"connection lost while {doing}; the next run finishes or undoes it")


def _event(host: str, line: bytes) -> dict[str, Any]:
    try:
        event: dict[str, Any] = json.loads(line)
        event["event"]
    except (ValueError, KeyError, TypeError) as error:
        raise ApplyError(host, f"the applier said something unexpected: {line[:200]!r}") from error
    return event


_DOING = {
    "ensure": "ensuring: {title}",
    "output": "ensuring: {title}",
    "check": "checking what was staged",
    "stage": "staging {path}",
    "remove": "removing {path}",
    "unit": "waiting for the {verb} of {unit}",
}
