"""A push as a user sees it: the real command on a host that is a folder."""

from __future__ import annotations

import json
from pathlib import Path

import localkit
import pytest
from folderhost import FolderHost, bundle

ROLE = """\
yield Ensure("before", "test -e $FAKE/touched", "touch $FAKE/touched", before=True)
yield Artefact("/etc/own.conf", b"own", restarts=("own.service",))
yield Artefact("/etc/systemd/system/own.service", b"", restarts=("own.service",))
"""
PUSH = ("provision", "--yes", "--skip-doctor", "--phase")


@pytest.fixture
def host(tmp_path: Path) -> FolderHost:
    return localkit.project(tmp_path, ROLE)


def test_a_directory_in_a_files_place_is_refused_before_anything_is_touched(host):
    (host.root / "etc/own.conf").mkdir(parents=True)
    why = (
        "/etc/own.conf is a directory, and a file is wanted there: "
        "move it away (mv /etc/own.conf /etc/own.conf.old)"
    )
    planned = localkit.run(host, "plan", "--phase", "p", code=1).stdout.splitlines()
    assert "  ~ /etc/own.conf  (a directory is there: refused)" in planned
    assert f"  refused: {why}" in planned
    told = json.loads(localkit.run(host, "plan", "--phase", "p", "--json", code=1).stdout)
    assert (told["ok"], told["hosts"]["here"]["refused"]) == (False, [why])
    pushed = localkit.run(host, *PUSH, "p", code=1)
    assert f"{why}; nothing was changed" in pushed.stdout
    assert not (host.fake / "touched").exists()
    assert host.remembered() == set()


def test_a_new_phase_with_the_same_files_is_recorded_without_restarts(host):
    localkit.run(host, *PUSH, "p")
    assert "restart own.service" in host.calls()
    planned = localkit.run(host, "plan", "--phase", "q", "--detailed-exitcode", code=2)
    assert planned.stdout.splitlines()[:2] == [
        "here: 1 to move",
        "  > phase q  (moves from p)",
    ]
    pushed = localkit.run(host, *PUSH, "q")
    assert "here  changed   1 change, 0 restarts" in pushed.stdout
    assert host.calls() == []
    assert host.snapshot(bundle()).phase == "q"
    assert localkit.run(host, *PUSH, "q").stdout.startswith("No changes")
