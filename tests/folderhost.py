"""A folder that is a host: the real bootstrap shell, probe and applier run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferfleet import wire
from inferfleet.errors import ApplyError
from inferfleet.model import Artefact, Bundle, Ensure, Host, Snapshot

STATE = "var/lib/inferfleet"

# It knows the units that lie below the root, logs what it is asked, and fails where told to.
SYSTEMCTL = """#!/bin/sh
case $1 in cat|reset-failed|is-active) ;; *) echo "$*" >>"$FAKE/calls";; esac
for word; do unit=$word; done
case $1 in
  cat) [ -e "$INFERFLEET_ROOT/etc/systemd/system/$unit" ] || [ -e "$FAKE/known/$unit" ];;
  is-active) [ -e "$FAKE/active/$3" ];;
  restart|reload-or-restart|disable) if [ -e "$FAKE/broken/$unit" ]; then
    echo "Job for $unit failed."; exit 1; fi;;
esac
"""
JOURNALCTL = """#!/bin/sh
echo "journal of $*"
"""


def bundle(*pieces: Artefact | Ensure, phase: str = "pilot") -> Bundle:
    return Bundle(Host("gpu-1", "192.0.2.1"), phase, (("engine", pieces),))


@dataclass
class FolderHost:
    """`runs`: commands are run there, with a systemctl that only keeps a list."""

    root: Path
    fake: Path
    runs: bool = True
    shell: str = "sh"
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for name in ("known", "broken", "active", "bin"):
            (self.fake / name).mkdir(parents=True, exist_ok=True)
        for name, script in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            (self.fake / "bin" / name).write_text(script)
            (self.fake / "bin" / name).chmod(0o755)
        (self.fake / "bin/python3").unlink(missing_ok=True)
        (self.fake / "bin/python3").symlink_to(Path(sys.executable).resolve())

    def environment(self) -> dict[str, str]:
        runs = {"INFERFLEET_RUN": "1"} if self.runs else {}
        path = f"{self.fake}/bin:{os.environ['PATH']}"
        mine = {"INFERFLEET_ROOT": str(self.root), "FAKE": str(self.fake), "PATH": path}
        return {**os.environ, **mine, **runs, **self.settings}

    @contextmanager
    def session(self) -> Iterator[Session]:
        command = wire.BOOTSTRAP.replace("sh -c", f"exec {self.shell} -c", 1)
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment()
        ) as process:
            try:
                yield Session(process)
            finally:
                process.kill()

    def snapshot(self, wanted: Bundle) -> Snapshot:
        with self.session() as session:
            return session.ask(wanted)

    def apply(self, wanted: Bundle, snapshot: Snapshot | None = None) -> list[dict[str, Any]]:
        """Both round trips in one session; ApplyError when a step fails."""
        with self.session() as session:
            seen = session.ask(wanted)
            session.send(*wire.request(wanted, snapshot or seen, owner="ana", reason="test"))
            return list(wire.events("gpu-1", session.lines))

    def failure(self, wanted: Bundle, snapshot: Snapshot | None = None) -> str:
        """The message of an apply that fails."""
        try:
            events = self.apply(wanted, snapshot)
        except ApplyError as error:
            return error.message
        raise AssertionError(events)

    def crash(self, wanted: Bundle, step: int) -> bool:
        """Apply, and end the applier before a step; False when there are fewer steps."""
        self.settings["INFERFLEET_CRASH_AT"] = str(step)
        with self.session() as session:
            seen = session.ask(wanted)
            session.send(*wire.request(wanted, seen, owner="ana", reason="test"))
            session.process.stdin.close()
            said = session.process.stdout.read()
            status = session.process.wait()
        del self.settings["INFERFLEET_CRASH_AT"]
        assert status in (0, 1, 137), said  # a run may also refuse, as it was asked to
        return status == 137

    def calls(self) -> list[str]:
        """What systemctl was asked since the last time."""
        log = self.fake / "calls"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Mode and content of all that is there, but for what the applier remembers."""
        return {
            str(path.relative_to(self.root)): (
                path.lstat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in sorted(self.root.rglob("*"))
            if not str(path.relative_to(self.root)).startswith("var")
        }

    def remembered(self) -> set[str]:
        """Names below the state directory."""
        state = self.root / STATE
        return {str(path.relative_to(state)) for path in state.rglob("*")}


class Session:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.lines = (line.rstrip(b"\n") for line in process.stdout)

    def send(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self.process.stdin.write(chunk)
        self.process.stdin.flush()

    def ask(self, wanted: Bundle) -> Snapshot:
        self.send(wire.question(wanted))
        return wire.answer("gpu-1", self.lines)
