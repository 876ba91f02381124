"""The real command on this machine as its only host, which is a folder; see `folderhost`."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
from folderhost import FolderHost

FLEET = """\
    hosts: {here: {connection: local, become: none}}
    phases:
      p: {users: 1, why: w, hosts: [here], roles: {own: {hosts: [here]}}}
      q: {users: 1, why: w, hosts: [here], roles: {own: {hosts: [here]}}}
"""
ROLE = """\
from inferfleet.model import Artefact, Ensure

KIND = "service"


def artefacts(step, plan, render):
"""
SCHEMA = "type: object\ndescription: Of a test.\nproperties: {}\n"


def project(folder: Path, role: str, fleet: str = FLEET, schema: str = SCHEMA) -> FolderHost:
    """A project in `folder` whose role `own` is a generator with the body `role`."""
    make.write(folder, fleet=fleet)
    own = folder / "roles/own"
    own.mkdir(parents=True)
    (own / "role.py").write_text(ROLE + textwrap.indent(textwrap.dedent(role), "    "))
    (own / "schema.yml").write_text(textwrap.dedent(schema))
    return FolderHost(folder / "root", folder / "fake")


def start(
    host: FolderHost, *words: str, terminal: int | None = None, **environment: str
) -> subprocess.Popen[str]:
    """The command in the host's project; what it prints goes to pipes or to the terminal."""
    pipe = subprocess.PIPE if terminal is None else terminal
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "inferfleet", *words],
        cwd=host.root.parent,
        env={**host.environment(), **environment},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def run(
    host: FolderHost, *words: str, code: int = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, to its end with the exit status `code`."""
    with start(host, *words, **environment) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return subprocess.CompletedProcess(process.args, code, out, err)


def until(check: Callable[[], Any]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + 20
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)
