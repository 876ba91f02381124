"""Processes of a measurement: pinned to a core, read from /proc, ended by their id."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "inferfleet" / "bench"
HERE = Path(__file__).parent
LOAD_CORE = 0
TEST_CORE = 1


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def pinned(core: int, nice: int) -> None:
    """Keeps this process, and what it starts, on one core; less nice where that is allowed."""
    os.sched_setaffinity(0, {core % (os.cpu_count() or 1)})
    with suppress(PermissionError, FileNotFoundError):  # figures are then a little noisier
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        Path("/proc/self/autogroup").write_text(str(nice))  # else niceness counts in a session only


def built(name: str) -> Path:
    """The program compiled from `name`.c, made anew when a source is newer."""
    program = CACHE / "bin" / name
    sources = [HERE / f"{name}.c", HERE / "wire.h"]
    if not program.exists() or program.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        program.parent.mkdir(parents=True, exist_ok=True)
        fresh = program.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-O2", "-o", str(fresh), str(sources[0])], check=True)
        fresh.replace(program)
    return program


class Running:
    """One process and those it started, on one core; ended on leaving."""

    def __init__(
        self,
        command: list[str],
        core: int,
        log: Path,
        env: dict[str, str] | None = None,
        pipe: bool = False,
        nice: int = -20,
    ) -> None:
        self.log = log
        with log.open("ab") as to:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE if pipe else to,
                stderr=to,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {}), "PYTHONDONTWRITEBYTECODE": ""},
                start_new_session=True,  # Ctrl-C is ours to pass on
                preexec_fn=lambda: pinned(core, nice),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end()

    @property
    def pids(self) -> list[int]:
        """The process and its children, theirs too."""
        found, wanted = [], [self.process.pid]
        while wanted:
            pid = wanted.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                wanted += [int(word) for word in read(children).split()]
        return found

    def cpu(self) -> float:
        """Seconds of CPU used so far, threads that have ended included."""
        stats = [read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() for pid in self.pids]
        ticks = sum(int(fields[11]) + int(fields[12]) for fields in stats if fields)
        return ticks / os.sysconf("SC_CLK_TCK")

    def waited(self) -> dict[str, float]:
        """Seconds for which each living thread was ready but had no core."""
        accounts = [a for pid in self.pids for a in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        return {str(a): int((read(a) or "0 0").split()[1]) / 1e9 for a in accounts}

    def memory(self) -> tuple[float, float]:
        """MB resident now and at most, of the largest of the processes."""
        each = [status(pid) for pid in self.pids]
        return max(now for now, _ in each), max(most for _, most in each)

    def end(self, patience: float = 5) -> None:
        """SIGTERM, then SIGKILL to whatever is left of the family."""
        family = self.pids
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        for pid in family[1:]:
            if f"/{self.process.pid} " in session(pid):
                os.kill(pid, signal.SIGKILL)
        if self.process.stdout:
            self.process.stdout.close()


def session(pid: int) -> str:
    """`/SESSION ` of a living process, so that a reused id is not taken for ours."""
    fields = read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return f"/{fields[3]} " if fields else ""


def read(path: Path) -> str:
    """A file's text; empty where the process has gone."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def status(pid: int) -> tuple[float, float]:
    """VmRSS and VmHWM in MB."""
    lines = dict(
        line.split(":", 1) for line in read(Path(f"/proc/{pid}/status")).splitlines() if ":" in line
    )
    return tuple(int(lines.get(k, "0 kB").split()[0]) / 1000 for k in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


class Engine(Running):
    """The stand-in for vLLM, with what it tells of its requests."""

    def __init__(self, log: Path, resets: bool = False) -> None:
        self.port = free_port()
        command = [str(built("engine")), str(self.port), *(["reset"] if resets else [])]
        super().__init__(command, LOAD_CORE, log, pipe=True, nice=-19)
        self._told: dict[tuple[str, str], int] = {}
        self._rest = b""
        wait_for_port(self)

    def told(self, what: str, name: str, patience: float) -> int | None:
        """When (ns, monotonic) it `got`, saw `closed` or `reset` the request of that name."""
        until = time.monotonic() + patience
        while (what, name) not in self._told:
            if not self._listen(max(0.0, until - time.monotonic())):
                return None
        return self._told[what, name]

    def _listen(self, patience: float) -> bool:
        pipe = self.process.stdout
        if pipe is None or not select.select([pipe], [], [], patience)[0]:
            return False
        data = os.read(pipe.fileno(), 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            what, name, ns = line.decode().split()
            self._told[what, name] = int(ns)
        return bool(data)


def wait_for_port(running: Running | Engine, port: int = 0, patience: float = 10) -> None:
    """Returns once it accepts connections; TimeoutError or ChildProcessError otherwise."""
    at = ("127.0.0.1", port or getattr(running, "port", 0))
    until = time.monotonic() + patience
    while True:
        try:
            socket.create_connection(at, 1).close()
            return
        except OSError:
            if running.process.poll() is not None:
                raise ChildProcessError(tail(running.log)) from None
            if time.monotonic() > until:
                raise TimeoutError(f"no answer on port {at[1]}: {tail(running.log)}") from None
            time.sleep(0.05)


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log in one."""
    return " | ".join(log.read_text(errors="replace").splitlines()[-lines:]) or "it said nothing"


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked: clients at once, for so many seconds, begun over so many ms."""

    body: Path
    clients: int
    seconds: float
    stagger: int = 0


def load(port: int, key: str, wanted: Load) -> dict[str, Any]:
    """What the load generator found; its keys are those of load.c, times in microseconds."""
    command = [str(built("load")), str(port), key, str(wanted.body)]
    command += [str(wanted.clients), str(wanted.seconds), str(wanted.stagger)]
    done = subprocess.run(
        command,
        capture_output=True,
        check=True,
        timeout=wanted.seconds + 90,
        start_new_session=True,
        preexec_fn=lambda: pinned(LOAD_CORE, -20),
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found
