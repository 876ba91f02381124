"""Ctrl-C while a push runs: the real command, on a host that stands at a gate."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import localkit
import pytest
from folderhost import FolderHost, bundle
from localkit import until

ROLE = """\
run = "touch $FAKE/begun; until [ -e $FAKE/gate ]; do sleep 0.02; done; touch $FAKE/ended"
yield Ensure("the gate opens", "test -e $FAKE/ended", run, timeout=20)
"""


@pytest.fixture
def host(tmp_path: Path) -> FolderHost:
    return localkit.project(tmp_path, ROLE)


@pytest.fixture
def pushing(host: FolderHost) -> Iterator[subprocess.Popen[str]]:
    """A provision that stands at the gate."""
    words = ["provision", "--phase", "p", "--yes", "--skip-doctor"]
    with localkit.start(host, *words) as process:
        until((host.fake / "begun").exists)
        yield process
        (host.fake / "gate").touch()
        process.kill()


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
