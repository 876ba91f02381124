"""Commands on the host, and what the client is told of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

from inferfleet.applier.disk import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Json = dict[str, Any]

RELOAD = "daemon-reload"
LINES = 15  # of a failing command's output
TEST_SECONDS = 30
CHECK_SECONDS = 60
UNIT_SECONDS = 900
LOOK_SECONDS = 0.5  # between two looks at what a running command prints
WINDOW = 1024  # bytes of its output that are looked at; a longer line is not shown
PATIENCE = 10  # seconds for a client to read on
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|.)")


def emit(event: str, **fields: Any) -> None:
    """Tell the client; when it is gone, or reads no more, go on in silence."""
    line = json.dumps({"event": event, **fields}).encode() + b"\n"
    with contextlib.suppress(OSError):
        for start in range(0, len(line), select.PIPE_BUF):
            if not listens(PATIENCE):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.write(1, line[start : start + select.PIPE_BUF])


def listens(seconds: float) -> bool:
    """Whether PIPE_BUF bytes can be told within so many seconds."""
    with contextlib.suppress(OSError):
        return bool(select.select((), (1,), (), seconds)[1])
    return False


def run(argv: Sequence[str], seconds: float, cwd: str = "/", title: str = "") -> tuple[int, str]:
    """Exit status (124: ran out of time, 127: cannot start) and the end of what was printed.

    With a `title`, the client is told what the command prints meanwhile.
    """
    # a file, not a pipe: a daemon the command leaves behind would keep a pipe open
    output = os.memfd_create("output")
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        status = waited(process, seconds, Follower(output, title) if title else None)
        printed = os.pread(output, 1 << 16, max(0, os.fstat(output).st_size - (1 << 16)))
    except OSError as error:
        return 127, f"{argv[0]}: {error.strerror}"
    finally:
        os.close(output)
    return status, printed.decode("utf-8", "replace")


def waited(
    process: subprocess.Popen[bytes], seconds: float, follower: Follower | None = None
) -> int:
    """Its exit status; out of time, its whole process group is asked to end, then killed."""
    end = time.monotonic() + seconds
    while True:
        left = max(0.0, end - time.monotonic())
        try:
            return process.wait(min(left, LOOK_SECONDS) if follower else left)
        except subprocess.TimeoutExpired:
            if time.monotonic() >= end:
                break
        if follower:
            follower.look()
    os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return 124


class Follower:
    """Tells the client what a running command printed last, if it is new and the client reads."""

    def __init__(self, output: int, title: str) -> None:
        self.output, self.title, self.told = output, title, ""

    def look(self) -> None:
        size = os.fstat(self.output).st_size
        start = max(0, size - WINDOW)
        line = latest(os.pread(self.output, WINDOW, start), whole=start == 0)
        if line not in ("", self.told) and listens(0):
            self.told = line
            emit("output", title=self.title, line=line)


def latest(window: bytes, whole: bool) -> str:
    """The last line, or state of a line, that was printed to its end; "" if there is none.

    Never a part of one: a secret in it could not be told. `whole`: the output begins here.
    """
    ended = re.split(rb"[\r\n]", window)[0 if whole else 1 : -1]
    lines = (plain(line.decode("utf-8", "replace")).strip() for line in reversed(ended))
    return next(filter(None, lines), "")


def plain(line: str) -> str:
    """A line without what colours it and moves the cursor."""
    return "".join(filter(str.isprintable, ESCAPES.sub("", line).expandtabs()))


def tail(text: str) -> str:
    """The last lines as a terminal shows them: of one that was overwritten, what came last."""
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n")]
    return "\n".join(map(plain, lines[-LINES:]))


def outcome(status: int, seconds: float) -> str:
    return f"ran out of time after {seconds:g} s" if status == 124 else f"exit status {status}"


def check(argv: Sequence[str], staged: Path) -> None:
    """Let a validator read a staged file; Failed when it finds fault."""
    status, printed = run(argv, CHECK_SECONDS, cwd=str(staged.parent))
    if argv[0].endswith("systemd-analyze") and "verify" in argv:
        # it exits 0 on unknown keys, and speaks of other units too
        ours = re.compile(rf"(?<![\w.@-]){re.escape(staged.name)}")
        status = status or bool(ours.search(printed))
    if status:
        said = printed.replace(str(staged), staged.name)
        late = f" ({outcome(status, CHECK_SECONDS)})" if status == 124 else ""
        raise Failed(f"{staged.name} is not valid, says {argv[0]}{late}:\n{tail(said)}")


def stop(unit: str) -> None:
    """Stop and disable a unit whose file goes; a broken one that does not run is let go."""
    emit("unit", unit=unit, verb="stop", state="running")
    status, printed = run(["systemctl", "disable", "--now", unit], UNIT_SECONDS)
    stays = status and not run(["systemctl", "is-active", "-q", unit], TEST_SECONDS)[0]
    emit("unit", unit=unit, verb="stop", state="failed" if stays else "ok")
    if stays:
        why = outcome(status, UNIT_SECONDS)
        raise Failed(f"{unit} cannot be stopped ({why}); the next run goes on:\n{tail(printed)}")
    run(["systemctl", "reset-failed", unit], TEST_SECONDS)  # or it is listed as failed for ever


def act(unit: str, verb: str) -> bool:
    """Do what a unit is owed; False when there is no such unit any more."""
    argv = ["systemctl", "reload-or-restart" if verb == "reload" else verb]
    if verb != RELOAD:
        argv.append(unit)
        if run(["systemctl", "cat", unit], TEST_SECONDS)[0]:
            emit("unit", unit=unit, verb=verb, state="gone")
            return False
        run(["systemctl", "reset-failed", unit], TEST_SECONDS)  # former crashes don't count
    emit("unit", unit=unit, verb=verb, state="running")
    status, printed = run(argv, UNIT_SECONDS)
    emit("unit", unit=unit, verb=verb, state="failed" if status else "ok")
    if status:
        why = f"{verb} of {unit} failed ({outcome(status, UNIT_SECONDS)}); it is still owed:"
        raise Failed("\n".join((why, tail(printed), journal([unit]))).rstrip())
    return verb != RELOAD


def journal(units: Sequence[str]) -> str:
    """The last lines that units wrote; empty without units or a journal."""
    chosen = [word for unit in dict.fromkeys(units) for word in ("-u", unit)]
    lines = ["-n", str(LINES), "--no-pager", "-o", "cat"]
    status, printed = run(["journalctl", *chosen, *lines], TEST_SECONDS) if units else (1, "")
    return "" if status else tail(printed)


def ensured(ensure: Json, units: Sequence[str], ready: Callable[[], None]) -> bool:
    """Make an ensure's test pass; whether that changed anything. Failed shows the units' log.

    `ready` is called before it is run: packages and `systemctl enable` reload systemd's units, too.
    """
    title, seconds = ensure["title"], ensure["timeout"]
    if test(ensure, TEST_SECONDS)[0] == 0:
        return False
    if ensure["run"]:
        ready()
    emit("ensure", title=title, state="running")
    status, printed = fix(ensure) if ensure["run"] else wait(ensure)
    emit("ensure", title=title, state="failed" if status else "ok")
    if status:
        why = f"{title}: {outcome(status, seconds)}"
        logs = "" if ensure["run"] else journal(units)
        raise Failed("\n".join(part for part in (why, tail(printed), logs) if part))
    return bool(ensure["run"])


def test(ensure: Json, seconds: float) -> tuple[int, str]:
    return run(["sh", "-c", ensure["test"]], seconds)


def fix(ensure: Json) -> tuple[int, str]:
    status, printed = run(["sh", "-c", ensure["run"]], ensure["timeout"], title=ensure["title"])
    if status:
        return status, printed
    status, reason = test(ensure, TEST_SECONDS)
    return status, f"{printed}{reason}its test still fails\n" if status else ""


def wait(ensure: Json) -> tuple[int, str]:
    """Repeat the test until it passes or the time is over."""
    end = time.monotonic() + ensure["timeout"]
    while True:
        left = end - time.monotonic()
        status, printed = test(ensure, min(TEST_SECONDS, max(left, 0.5)))
        if status == 0 or time.monotonic() >= end:
            return (124 if status else 0), printed
        time.sleep(0.5)
