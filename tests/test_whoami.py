"""Who runs this: also a uid that has no name, as in a container."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from inferfleet import whoami

SCRIPT = """\
import os, pwd
from inferfleet import sshconfig, whoami
from inferfleet.errors import TransportError
from inferfleet.model import Host
from inferfleet.transport import Options

os.setuid(54321)
print(whoami.owner())
os.environ["HOME"] = "/"
try:
    sshconfig.route(Host("gpu-01", "192.0.2.1"), Options())
except TransportError as error:
    print(error)
os.environ["LOGNAME"] = "ana"
print(whoami.owner(), sshconfig.route(Host("gpu-01", "192.0.2.1"), Options())[0].user)
"""
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


def test_the_owner_is_a_user_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    assert whoami.owner() == f"ana@{socket.gethostname()}"


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_a_uid_without_a_name_can_be_told_and_is_asked_for_one_by_ssh() -> None:
    environment = {key: value for key, value in os.environ.items() if key not in NAMES}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=environment, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    machine = socket.gethostname()
    assert done.stdout.splitlines() == [
        f"uid 54321@{machine}",
        "gpu-01: uid 54321 has no name here: set LOGNAME",
        f"ana@{machine} ana",
    ]
