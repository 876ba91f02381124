"""A daemon-reload leaves running containers their GPUs, or is not done, or says what it took.

The host is a folder; docker and systemctl are stand-ins that keep the state of one container: its
GPUs are gone once systemd reloads with a list that lacks them, as with NVIDIA's hook.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from folderhost import FolderHost, bundle

from inferfleet.model import Artefact, Ensure

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="makes device nodes")

UNIT = Artefact("/etc/systemd/system/a.service", b"[Unit]\n", restarts=("a.service",))
CONFIG = Artefact("/etc/a/a.conf", b"port = 1\n", restarts=("a.service",))
ENABLE = Ensure("a is enabled", "test -e $FAKE/enabled", "systemctl daemon-reload; >$FAKE/enabled")
ID = "c0ffee" + "0" * 58
SCOPE = f"docker-{ID}.scope"
GPU, CONTROL = "/dev/char/195:0 rw", "/dev/char/195:255 rw"

DOCKER = """#!/bin/sh
cd "$FAKE/container" || exit 1
case $1 in
  ps) cat id;;
  inspect) echo "$4 /trainer 4242 $(cat started)";;
  exec)
    shift 2
    [ -e tools ] || exit 127
    echo "$*" >>asked
    if [ -e lost ]; then echo "Failed to initialize NVML: Unknown Error"; exit 255; fi
    echo "GPU 0: NVIDIA L40S (UUID: GPU-0)";;
  *) exit 1;;
esac
"""
SYSTEMCTL = """#!/bin/sh
cd "$FAKE/container" || exit 1
case $1 in
  show) for word; do scope=$word; done
    [ "$scope" = "docker-$(cat id).scope" ] && cat properties || echo LoadState=not-found;;
  set-property)
    [ ! -e deaf ] || { echo 'Failed to set unit properties'; exit 1; }
    (shift 3; printf '%s\\n' "$@" >>properties);;
  daemon-reload)
    [ ! -e stuck ] || exit 1
    ! grep -qE 'DevicePolicy=(strict|closed)' properties ||
      grep -qE '195:0|/dev/nvidia0|char-.* rw' properties || : >lost;;
esac
case $1 in show|cat|is-active|reset-failed) ;; *) echo "$*" >>"$FAKE/calls";; esac
exit 0
"""


@dataclass
class Training(FolderHost):
    """A host on which somebody's container trains on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.container.mkdir()
        for name, script in (("docker", DOCKER), ("systemctl", SYSTEMCTL)):
            (self.fake / "bin" / name).write_text(script)
            (self.fake / "bin" / name).chmod(0o755)
        self.set("id", f"{ID}\n")
        self.set("started", "2026-01-01T00:00:00Z")
        self.set("tools")
        self.listed("/dev/null rw")
        own = self.root / "proc/4242/root/dev"
        for folder in (own, self.root / "dev"):
            folder.mkdir(parents=True)
            os.mknod(folder / "nvidia0", 0o020666, os.makedev(195, 0))
            os.mknod(folder / "nvidiactl", 0o020666, os.makedev(195, 255))
            os.mknod(folder / "null", 0o020666, os.makedev(1, 3))
        devices = "Character devices:\n  1 mem\n195 nvidia-frontend\n\nBlock devices:\n"
        (self.root / "proc/devices").write_text(devices)

    @property
    def container(self) -> Path:
        return self.fake / "container"

    def set(self, name: str, text: str = "") -> None:
        (self.container / name).write_text(text)

    def listed(self, *allowed: str, policy: str = "strict") -> None:
        lines = [
            "LoadState=loaded",
            f"DevicePolicy={policy}",
            *(f"DeviceAllow={a}" for a in allowed),
        ]
        self.set("properties", "".join(f"{line}\n" for line in lines))

    @property
    def lost(self) -> bool:
        return (self.container / "lost").exists()

    @property
    def asked(self) -> bool:
        return (self.container / "asked").exists()


@pytest.fixture
def host(tmp_path: Path) -> Training:
    return Training(tmp_path / "root", tmp_path / "fake")


def test_what_is_missing_on_systemds_list_is_put_there_before_it_reloads(host: Training) -> None:
    events = host.apply(bundle(UNIT))
    assert host.calls() == [
        f"set-property --runtime {SCOPE} DeviceAllow={GPU} DeviceAllow={CONTROL}",
        "daemon-reload",
        "restart a.service",
    ]
    assert not host.lost
    title = "a daemon-reload leaves trainer its GPUs"
    states = [event["state"] for event in events if event.get("title") == title]
    assert states == ["running", "ok"]
    for link, node in (("195:0", "nvidia0"), ("195:255", "nvidiactl")):
        assert str((host.root / "dev/char" / link).readlink()) == f"../{node}"


@pytest.mark.parametrize(
    ("allowed", "policy"),
    [
        ((GPU, CONTROL), "strict"),
        (("/dev/nvidia0 rwm", "/dev/nvidiactl rw"), "closed"),
        (("char-nvidia* rw",), "strict"),
        (("char-* rwm",), "strict"),
        ((), "auto"),
    ],
)
def test_a_list_that_has_them_is_left_alone(
    host: Training, allowed: tuple[str, ...], policy: str
) -> None:
    host.listed(*allowed, policy=policy)
    host.apply(bundle(UNIT))
    assert host.calls() == ["daemon-reload", "restart a.service"]


def test_to_make_nodes_is_not_to_use_them(host: Training) -> None:
    host.listed("char-* m", GPU)
    host.apply(bundle(UNIT))
    assert host.calls()[0] == f"set-property --runtime {SCOPE} DeviceAllow={CONTROL}"


def test_cgroups_of_dockers_own_are_safe(host: Training) -> None:
    host.set("properties", "LoadState=not-found\nDevicePolicy=auto\n")
    host.apply(bundle(UNIT))
    assert host.calls() == ["daemon-reload", "restart a.service"]


def test_where_systemd_cannot_be_told_nothing_is_done(host: Training) -> None:
    host.set("deaf")
    before = host.tree()
    message = host.failure(bundle(UNIT, CONFIG))
    assert message.startswith("trainer would lose its GPUs")
    assert "CDI device names" in message
    assert message.endswith("Failed to set unit properties")
    assert "daemon-reload" not in host.calls()
    after = {path: state for path, state in host.tree().items() if not path.startswith("dev/char")}
    assert after == before
    assert not host.snapshot(bundle(UNIT, CONFIG)).interrupted


def test_a_change_without_a_reload_asks_nobody(host: Training) -> None:
    host.set("deaf")
    assert host.apply(bundle(CONFIG))[-1]["event"] == "done"
    assert not host.asked


def test_commands_may_reload_too(host: Training) -> None:
    host.apply(bundle(ENABLE))
    assert host.calls()[0].startswith("set-property")
    assert not host.lost


def test_a_reload_owed_by_a_former_run_is_guarded(host: Training) -> None:
    host.set("stuck")
    host.set("id")
    assert host.failure(bundle(UNIT)).startswith("daemon-reload of daemon-reload failed")
    (host.container / "stuck").unlink()
    host.set("id", f"{ID}\n")
    host.calls()
    host.apply(bundle(UNIT))
    assert host.calls()[0].startswith("set-property")
    assert not host.lost


def test_gpus_lost_nevertheless_are_told_with_the_remedy(host: Training) -> None:
    host.listed(GPU, CONTROL)
    broken = Ensure("it goes wrong", "test -e $FAKE/done", ">$FAKE/container/lost; >$FAKE/done")
    message = host.failure(bundle(UNIT, broken))
    assert "have lost their GPUs: trainer" in message
    assert "docker restart trainer" in message


def test_a_failing_step_does_not_hide_that_gpus_are_lost(host: Training) -> None:
    host.listed(GPU, CONTROL)
    broken = Ensure("it goes wrong", "false", ">$FAKE/container/lost; exit 3")
    message = host.failure(bundle(UNIT, broken))
    assert "it goes wrong: exit status 3" in message
    assert "have lost their GPUs: trainer" in message


@pytest.mark.parametrize("how", ["started", "id"])
def test_a_container_that_was_started_anew_or_ended_lost_nothing(host: Training, how: str) -> None:
    value = "2026-01-02T00:00:00Z" if how == "started" else ""
    restart = Ensure("it is started anew", "test -e $FAKE/done", f"""
        echo {value} >$FAKE/container/{how}; >$FAKE/container/lost; >$FAKE/done""")  # fmt: skip
    assert host.apply(bundle(UNIT, restart))[-1]["event"] == "done"


def test_what_was_lost_before_is_not_our_doing(host: Training) -> None:
    host.set("lost")
    assert host.apply(bundle(UNIT))[-1]["event"] == "done"
    assert host.calls() == ["daemon-reload", "restart a.service"]


def test_a_container_in_which_nothing_can_look_is_kept_and_not_judged(host: Training) -> None:
    (host.container / "tools").unlink()
    assert host.apply(bundle(UNIT))[-1]["event"] == "done"
    assert host.calls()[0].startswith("set-property")


def test_a_container_without_gpus_is_not_asked(host: Training) -> None:
    for node in ("nvidia0", "nvidiactl"):
        (host.root / "proc/4242/root/dev" / node).unlink()
    host.apply(bundle(UNIT))
    assert host.calls() == ["daemon-reload", "restart a.service"]
    assert not host.asked
