"""A push as a user sees it: the real command on a host that is a folder."""

from __future__ import annotations

import json
import os
import pty
from contextlib import suppress
from pathlib import Path

import localkit
import pytest
from folderhost import FolderHost, bundle

ROLE = """\
yield Ensure("before", "test -e $FAKE/touched", "touch $FAKE/touched", before=True)
yield Artefact("/etc/own.conf", b"own", restarts=("own.service",))
yield Artefact("/etc/systemd/system/own.service", b"", restarts=("own.service",))
"""
SECRETS = """\
    type: object
    description: Of a test.
    properties:
      key: {type: string, writeOnly: true, description: A key.}
      more: {type: array, description: More., items: {type: string, writeOnly: true}}
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


def test_all_secrets_that_cannot_be_resolved_are_told_with_their_places(tmp_path):
    fleet = """\
        hosts: {here: {connection: local, become: none}}
        phases:
          p:
            users: 1
            why: w
            hosts: [here]
            roles:
              own:
                hosts: [here]
                key: !env LACKING_KEY
                more: [!file no.key, !env GIVEN_KEY]
          q: {users: 1, why: w, hosts: [here], roles: {own: {hosts: [here], key: !env LACKING_KEY}}}
    """
    role = """\
        for number, key in enumerate((step.settings["key"], *step.settings["more"])):
            yield render.copy(f"/etc/own/{number}", key, mode=0o600)
    """
    host = localkit.project(tmp_path, role, fleet, SECRETS)
    failed = localkit.run(host, *PUSH, "p", code=1, GIVEN_KEY="sesame-open")
    assert failed.stderr.splitlines() == [
        "inventory/fleet.yml:10:14: phases.p.roles.own.key: "
        "the environment variable LACKING_KEY is not set",
        "inventory/fleet.yml:11:16: phases.p.roles.own.more[0]: "
        "inventory/no.key cannot be read: no such file or directory",
        "2 problems.",
    ]
    assert host.remembered() == set()
    told = json.loads(localkit.run(host, *PUSH, "p", "--json", code=1).stdout)
    assert [problem["line"] for problem in told["problems"]] == [10, 11, 11]


def test_a_terminal_shows_live_what_a_command_prints_and_masks_secrets(tmp_path):
    """The command ends once its line has been shown."""
    fleet = localkit.FLEET.replace("{own: {hosts", "{own: {key: !env OPEN_KEY, hosts")
    role = """\
        yield render.copy("/etc/own/key", step.settings["key"], mode=0o600)
        run = "echo key is $(cat $INFERFLEET_ROOT/etc/own/key); "
        run += "until [ -e $FAKE/gate ]; do sleep 0.02; done; touch $FAKE/ended"
        yield Ensure("the gate opens", "test -e $FAKE/ended", run, timeout=20)
    """
    host = localkit.project(tmp_path, role, fleet, SECRETS)
    ours, terminal = pty.openpty()
    with localkit.start(host, *PUSH, "p", terminal=terminal, OPEN_KEY="sesame-open") as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # so the end of a terminal is told
            while data := os.read(ours, 1 << 16):
                shown += data
                if b"here  the gate opens: key is <secret env:OPEN_KEY>" in shown:
                    (host.fake / "gate").touch()
    os.close(ours)
    assert process.returncode == 0, shown
    assert b"sesame" not in shown
