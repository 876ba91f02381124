"""Ctrl-C while a push runs: the real command, on a host that is a folder and stands at a gate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import make
import pytest
from folderhost import FolderHost, bundle

ROLE = """\
from inferfleet.model import Ensure

KIND = "service"


def artefacts(step, plan, render):
    run = "touch $FAKE/begun; until [ -e $FAKE/gate ]; do sleep 0.02; done; touch $FAKE/ended"
    yield Ensure("the gate opens", "test -e $FAKE/ended", run)
"""
FLEET = """\
    hosts: {here: {connection: local, become: none}}
    phases: {p: {users: 1, why: w, hosts: [here], roles: {gate: {hosts: [here]}}}}
"""


@pytest.fixture
def host(tmp_path: Path) -> FolderHost:
    make.write(tmp_path, fleet=FLEET)
    role = tmp_path / "roles/gate"
    role.mkdir(parents=True)
    (role / "role.py").write_text(textwrap.dedent(ROLE))
    (role / "schema.yml").write_text("type: object\ndescription: A gate.\nproperties: {}\n")
    return FolderHost(tmp_path / "root", tmp_path / "fake")


@pytest.fixture
def pushing(host: FolderHost, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A provision that stands at the gate."""
    words = ["provision", "--phase", "p", "--yes", "--skip-doctor"]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "inferfleet", *words],
        cwd=tmp_path,
        env=host.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until((host.fake / "begun").exists)
        yield process
        (host.fake / "gate").touch()
        process.kill()


def until(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupt(process: subprocess.Popen[str], sign: str) -> str:
    """Press Ctrl-C; what is said up to the line with `sign`."""
    assert process.stderr
    os.kill(process.pid, signal.SIGINT)
    said = ""
    for line in process.stderr:
        said += line
        if sign in line:
            return said
    raise AssertionError(said)


def test_the_first_says_at_once_what_happens_and_lets_hosts_finish(host, pushing):
    said = interrupt(pushing, "Ctrl-C")
    assert said.splitlines()[-1] == (
        "finishing on 1 host; Ctrl-C again leaves them to finish by themselves"
    )
    assert pushing.poll() is None
    (host.fake / "gate").touch()
    out, _ = pushing.communicate(timeout=20)
    assert pushing.returncode == 130
    assert out.splitlines()[-2].startswith("here  changed")


def test_the_second_leaves_them_and_they_finish_by_themselves(host, pushing):
    interrupt(pushing, "Ctrl-C")
    interrupt(pushing, "a host that had begun finishes by itself")
    assert pushing.wait(5) == 130
    assert host.snapshot(bundle()).lock, "the applier goes on"
    (host.fake / "gate").touch()
    until((host.fake / "ended").exists)
    until(lambda: not host.snapshot(bundle()).lock)
    assert host.snapshot(bundle()).generation == 1
