"""A fleet of real hosts with a project of its own, driven as a user drives it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from labkit import require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet import push
from inferfleet.errors import HostError
from inferfleet.lab import rehearsal
from inferfleet.model import Result
from inferfleet.project import Project

TOOL = Path(sys.executable).with_name("inferfleet")
LABEL = "fleet"
MANAGED = ("etc/inferfleet", "opt/inferfleet", "etc/systemd/system")
MEMORY = "var/lib/inferfleet"
Tree = dict[str, tuple[int, int, str]]

WIPE = f"""
systemctl disable -q --now $(systemctl list-units --all --plain --no-legend 'inferfleet-*' \
  | cut -d' ' -f1) 2>/dev/null
rm -rf /etc/inferfleet /opt/inferfleet /etc/systemd/system/inferfleet-* /{MEMORY}
systemctl daemon-reload && systemctl reset-failed
"""


@pytest.fixture(scope="session")
def booted_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two GPU servers and a balancer, booted when first asked for."""
    require_lab()
    take_down_remains(LABEL)
    with labs.Lab.boot(["gpu-01", "gpu-02", "lb-01"], name=f"{LABEL}-{os.getpid()}") as lab:
        yield Fleet(lab, tmp_path_factory.mktemp("fleet"))


@dataclass(frozen=True)
class Ran:
    """How a task ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def line(self, host: str) -> str:
        """The host's one line of the summary."""
        found = [x for x in self.out.splitlines() if re.match(rf"{host} +(failed|(un)?changed)", x)]
        assert len(found) == 1, self.out + self.err
        return found[0]


class Fleet:
    """The lab, the project made for it, and the tool; no run may print a secret."""

    def __init__(self, lab: labs.Lab, folder: Path, wheels: Path | None = None) -> None:
        self.lab, self.folder = lab, folder
        self.hosts: Mapping[str, labs.LabHost] = lab.hosts
        self.inventory = rehearsal.project(lab, folder / "project", wheels)
        self._pristine = folder / "pristine"
        shutil.copytree(self.inventory, self._pristine)
        (folder / "home/.ssh").mkdir(parents=True)
        (folder / "home/.ssh/config").write_text("ConnectTimeout 2\n")

    # The project

    def restore(self) -> None:
        """The inventory as it was made."""
        shutil.rmtree(self.inventory)
        shutil.copytree(self._pristine, self.inventory)

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.inventory / file
        text = path.read_text()
        assert text.count(old) == 1, f"{old!r} in {path}"
        path.write_text(text.replace(old, new))

    def set_host(self, host: str, **settings: Any) -> None:
        path = self.inventory / "hosts.yml"
        document = yaml.safe_load(path.read_text())
        document["hosts"][host].update(settings)
        path.write_text(yaml.safe_dump(document, sort_keys=False))

    def key(self, name: str) -> str:
        return (self.inventory / "secrets" / f"{name}.key").read_text().strip()

    @property
    def secrets(self) -> list[str]:
        """Every value that must stay hidden; of the TLS key, a line of its body."""
        keys = sorted((self.inventory / "secrets").glob("*.key"))
        texts = {path.stem: path.read_text().strip() for path in keys}
        return [texts.pop("tls").splitlines()[1], *texts.values()]

    # The tool

    def start(self, *words: str, phase: str = "production") -> subprocess.Popen[str]:
        argv = [str(TOOL), *words, "--inventory", str(self.inventory)]
        return subprocess.Popen(
            [*argv, "--phase", phase, *([] if words[0] == "check" else ["--rehearse"])],
            cwd=self.folder,
            env={**os.environ, "HOME": str(self.folder / "home")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, phase: str = "production", code: int = 0) -> Ran:
        """Run a task to its end; `code` is the exit status it must have."""
        return self.ended(self.start(*words, phase=phase), code)

    def ended(self, process: subprocess.Popen[str], code: int = 0) -> Ran:
        out, err = process.communicate(timeout=60)
        ran = Ran(process.returncode, out, err)
        assert ran.code == code, out + err
        assert not [secret for secret in self.secrets if secret in out + err]
        assert "Traceback" not in err
        return ran

    def push(self, phase: str = "production", **options: Any) -> dict[str, Result | HostError]:
        """Provision in this process; `options` are the transport's."""
        project = Project(self.inventory)
        plan = project.plan(phase, rehearse=True)
        bundles = project.bundles(plan, plan.hosts, project.secrets)
        chosen = replace(project.options(), **options)

        def provision(bundle: Any) -> Result:
            surveyed = push.survey(bundle, chosen)
            try:
                return push.apply(surveyed, f"provision {phase}", lambda *_: None)
            finally:
                surveyed.close()

        return {b.host.name: outcome for b, outcome in push.each(bundles, provision)}

    def settle(self, phase: str = "production") -> None:
        """The inventory as it was made, and the hosts as it says."""
        self.restore()
        for outcome in self.push(phase).values():
            assert isinstance(outcome, Result), outcome

    def wipe(self, *names: str) -> None:
        """Hosts on which nothing ever was provisioned."""
        for name in names or self.hosts:
            said(self.hosts[name], WIPE)

    def trees(self) -> dict[str, Tree]:
        return {name: tree(host) for name, host in self.hosts.items()}

    def units(self) -> dict[str, dict[str, str]]:
        return {name: units(host) for name, host in self.hosts.items()}

    def assert_clean(self) -> None:
        """Every host is as wanted, and nothing of any run is left over."""
        ran = self.run("provision", "--yes", "--json")
        assert {r["status"] for r in ran.json["hosts"].values()} == {"unchanged"}, ran.out
        for host in self.hosts.values():
            assert leftovers(host) == []


def said(host: labs.LabHost, command: str) -> str:
    result = host.exec(command)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout.strip()


def tree(host: labs.LabHost) -> Tree:
    """Mode, owner and digest of all that inferfleet could have put there, by path."""
    return {
        f"/{path.relative_to(host.root)}": _state(path)
        for top in MANAGED
        for path in (host.root / top).rglob("*")
        if top.startswith(("etc/inferfleet", "opt")) or "inferfleet" in path.name
    }


def _state(path: Path) -> tuple[int, int, str]:
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        return info.st_mode, info.st_uid, str(path.readlink())
    content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
    return info.st_mode, info.st_uid, hashlib.sha256(content).hexdigest()


def units(host: labs.LabHost) -> dict[str, str]:
    """The invocation of each of our units that is active, by name: a restart changes it."""
    shown = said(host, "systemctl show -p Id,InvocationID,ActiveState 'inferfleet-*'")
    blocks = [dict(x.split("=", 1) for x in b.splitlines()) for b in shown.split("\n\n") if b]
    return {b["Id"]: b["InvocationID"] for b in blocks if b["ActiveState"] == "active"}


def leftovers(host: labs.LabHost) -> list[str]:
    """What an interrupted run leaves and a finished one must not."""
    memory = host.root / MEMORY
    staged = [p for top in MANAGED for p in (host.root / top).rglob(".*inferfleet-*")]
    unfinished = [memory / "transaction", memory / "owed", *memory.rglob("*.part")]
    unfinished += memory.rglob("*.new")
    return [str(path) for path in (*staged, *unfinished) if path.exists()]


def until(check: Callable[[], Any], what: str, seconds: float = 20) -> Any:
    """Wait for a condition and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, f"in vain for {seconds} s: {what}"
        time.sleep(0.005)
    return found


def locked(host: labs.LabHost) -> bool:
    """Whether an applier is at work there."""
    try:
        with (host.root / MEMORY / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# A command on a host, held for as long as a test wants: the run that called it waits.

_HELD = """#!/bin/sh
case "$*" in {pattern}*)
  [ ! -e {folder}/hold ] || : > {folder}/held
  while [ -e {folder}/hold ]; do sleep 0.02; done;;
esac
exec {real} "$@"
"""
_FOLDER = "var/tmp/hold"
_REAL = {"systemctl": "/usr/bin/systemctl", "systemd-analyze": "/usr/bin/systemd-analyze"}


@dataclass(frozen=True)
class Hold:
    """A place in a run: the moment a host runs `command` with arguments that begin so."""

    host: labs.LabHost

    @property
    def _folder(self) -> Path:
        return self.host.root / _FOLDER

    def set(self, moment: str) -> None:
        command, _, pattern = moment.partition(" ")
        self._folder.mkdir(exist_ok=True)
        (self._folder / "hold").touch()
        script = _HELD.format(
            pattern=pattern.replace(" ", "\\ "), folder=f"/{_FOLDER}", real=_REAL[command]
        )
        wrapper = self.host.root / "usr/local/sbin" / command
        wrapper.write_text(script)
        wrapper.chmod(0o755)

    def reached(self) -> bool:
        return (self._folder / "held").exists()

    def release(self) -> None:
        for command in _REAL:
            (self.host.root / "usr/local/sbin" / command).unlink(missing_ok=True)
        for name in ("hold", "held"):
            (self._folder / name).unlink(missing_ok=True)


@contextmanager
def held(moments: Mapping[labs.LabHost, str]) -> Iterator[Callable[[Callable[[], bool]], None]]:
    """Hosts that stop a run at a moment, such as "systemctl restart"; gives a wait for all."""
    holds = [Hold(host) for host in moments]
    with ExitStack() as stack:
        for hold in holds:
            stack.callback(hold.release)
            hold.set(moments[hold.host])

        def wait(over: Callable[[], bool]) -> None:
            until(lambda: over() or all(hold.reached() for hold in holds), f"{moments.values()}")
            assert not over(), "the run ended before all of its hosts were where they should stand"

        yield wait


def wait_unlocked(hosts: Iterable[labs.LabHost]) -> None:
    until(lambda: not any(map(locked, hosts)), "the applier ends")


class Watch(threading.Thread):
    """Every command line seen on this machine and its hosts while it runs, as ps would show it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[bytes] = set()
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            for process in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # it ended meanwhile
                    self.seen.add(process.read_bytes())

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
