"""What is left when the applier is killed, its disk is full, or its client goes away."""

import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from folderhost import FolderHost, bundle

from inferfleet import wire
from inferfleet.errors import ApplyError
from inferfleet.model import Artefact, Ensure

OLD = bundle(
    Artefact("/etc/systemd/system/a.service", b"old unit", restarts=("a.service",)),
    Artefact("/etc/systemd/system/gone.service", b"gone unit", restarts=("gone.service",)),
    Artefact("/etc/a/conf", b"old conf", restarts=("a.service",)),
    Artefact("/etc/a/only-old/x", b"old x"),
    Artefact("/etc/same", b"same"),
)
NEW = bundle(
    Artefact("/etc/systemd/system/a.service", b"new unit", restarts=("a.service",)),
    Artefact("/etc/a/conf", b"new conf", mode=0o600, restarts=("a.service",)),
    Artefact("/etc/a/site", b"site", reloads=("nginx.service",)),
    Artefact("/etc/fresh/folder/y", b"new y"),
    Artefact("/etc/same", b"same"),
)
# a run that recovers what was left and then changes nothing itself
REFUSED = bundle(Ensure("refused", "false", "false", before=True))


@pytest.fixture
def old(tmp_path) -> FolderHost:
    host = FolderHost(tmp_path / "old/root", tmp_path / "old/fake")
    (host.fake / "known/nginx.service").touch()
    host.apply(OLD)
    host.calls()
    return host


def copy(host: FolderHost, name: object) -> FolderHost:
    folder = host.root.parent.with_name(str(name))
    shutil.copytree(host.root.parent, folder, symlinks=True)
    return FolderHost(folder / "root", folder / "fake")


@pytest.fixture
def trees(old):
    """The tree before and after a run that nothing disturbs."""
    undisturbed = copy(old, "undisturbed")
    undisturbed.apply(NEW)
    return old.tree(), undisturbed.tree()


def every_step(crash) -> int:
    """Call `crash(step)` for 1, 2, ..., two at a time, until it says there is no such step."""
    with ThreadPoolExecutor(2) as pool:
        for start in range(1, 200, 4):
            reached = list(pool.map(crash, range(start, start + 4)))
            if not all(reached):
                assert reached == sorted(reached, reverse=True)
                return start + sum(reached) - 1
    raise AssertionError("it never ends")


def assert_old_or_new(host: FolderHost, trees) -> None:
    """Each file is, whatever else was under way."""
    for path, (mode, content) in host.tree().items():
        if ".inferfleet-" not in path and content:
            assert (mode, content) in [tree.get(path) for tree in trees], path


def assert_recovers(host: FolderHost, trees) -> None:
    """All is old or all is new once any later run was there, and what is new is owed or paid."""
    interrupted = host.snapshot(NEW).interrupted
    assert host.failure(REFUSED).startswith("refused")
    assert host.tree() in trees
    assert not [p for p in host.root.rglob("*") if ".inferfleet-" in p.name or ".part" in p.name]
    if interrupted and host.tree() == trees[1]:
        assert host.snapshot(NEW).owed == ("daemon-reload", "a.service", "nginx.service")


def assert_completes(host: FolderHost, trees) -> None:
    """The next run leaves all new, all paid, and nothing over."""
    host.apply(NEW)
    assert host.tree() == trees[1]
    seen = host.snapshot(NEW)
    assert (seen.owed, seen.interrupted, seen.generation) == ((), False, 2)
    calls = host.calls()
    assert "disable --now gone.service" in calls
    last = {call: number for number, call in enumerate(calls)}
    assert last["daemon-reload"] < last["restart a.service"]
    assert "reload-or-restart nginx.service" in last
    blobs = {f"blobs/{a.digest}" for wanted in (OLD, NEW) for a in wanted.artefacts}
    generations = {"generations/1.json", "generations/2.json"}
    names = {"lock", "current.json", "blobs", "generations"}
    assert host.remembered() == names | blobs | generations


def test_killed_before_every_step_in_turn(old, trees):
    def killed(step):
        host = copy(old, step)
        if not host.crash(NEW, step):
            return False
        assert_old_or_new(host, trees)
        assert_recovers(host, trees)
        assert_completes(host, trees)
        return True

    assert every_step(killed) > 45


@pytest.mark.parametrize("committed", [False, True])
def test_killed_again_while_it_recovers(old, trees, committed):
    crashed = copy(old, "crashed")
    for step in range(1, 100):  # the last step before the commit, or the first after it
        before, crashed = crashed, copy(old, f"crashed-{step}")
        assert crashed.crash(NEW, step)
        if "transaction/commit" in crashed.remembered():
            break
    crashed = crashed if committed else before

    def killed(step):
        host = copy(crashed, step)
        if not host.crash(REFUSED, step):
            return False
        assert_old_or_new(host, trees)
        assert host.failure(REFUSED).startswith("refused")
        assert host.tree() == trees[committed]
        return True

    assert every_step(killed) > 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few hundred KiB."""
    if os.getuid():
        pytest.skip("needs root to mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts = []

    def mounted(kib):
        target = disk / str(kib)
        target.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", target], check=True)
        mounts.append(target)
        return target

    yield mounted
    for target in mounts:
        subprocess.run(["umount", target], check=True)


def attempt(host: FolderHost, wanted) -> str:
    try:
        host.apply(wanted)
    except ApplyError as error:
        return error.message
    return ""


def test_a_full_disk_is_told_and_leaves_nothing(small_disk, tmp_path):
    """With ever more room it fails at ever later steps, and at last it fits."""
    big = bundle(
        *(Artefact(f"/etc/{n}/big", bytes([n]) * 60_000, validate=("true",)) for n in range(2)),
        Artefact("/etc/same", b"new", restarts=("a.service",)),
    )
    full = []
    for kib in range(160, 640, 32):
        host = FolderHost(small_disk(kib), tmp_path / "fake")
        host.apply(OLD)
        host.calls()
        before, remembered = host.tree(), host.remembered()
        message = attempt(host, big)
        full.append(bool(message))
        if message:
            assert message.startswith("No space left on device")
            assert message.endswith("no file was changed")
            assert (host.tree(), host.remembered()) == (before, remembered)
            assert host.calls() == []
        else:
            assert (host.root / "etc/1/big").stat().st_size == 60_000
    assert len({*full}) == 2
    assert full == sorted(full, reverse=True)


def test_the_client_may_go_while_the_applier_works(tmp_path):
    host = FolderHost(tmp_path / "root", tmp_path / "fake")
    gate = Ensure("gate", "test -e $FAKE/go", timeout=30, before=True)
    wanted = bundle(gate, *OLD.artefacts, Ensure("after", "test -e $FAKE/x", "touch $FAKE/x"))
    with host.session() as session:
        seen = session.ask(wanted)
        session.send(*wire.request(wanted, seen, owner="ana", reason="test"))
        assert next(wire.events("gpu-1", session.lines))["title"] == "gate"
        for pipe in (session.process.stdin, session.process.stdout, session.process.stderr):
            pipe.close()
        session.process.send_signal(signal.SIGHUP)
        (host.fake / "go").touch()
        assert session.process.wait(30) == 0
    assert (host.root / "etc/a/conf").read_bytes() == b"old conf"
    assert (host.fake / "x").exists()
    assert not host.snapshot(wanted).interrupted


@pytest.mark.parametrize("share", [0.2, 0.9, 0.9999])
def test_a_request_cut_short_changes_nothing(tmp_path, share):
    host = FolderHost(tmp_path / "root", tmp_path / "fake")
    wanted = bundle(Artefact("/etc/big", os.urandom(100_000)), *OLD.artefacts)
    with host.session() as session:
        seen = session.ask(wanted)
        whole = b"".join(wire.request(wanted, seen, owner="ana", reason="test"))
        session.send(whole[: int(len(whole) * share)])
        session.process.communicate()
    assert host.tree() == {}
    assert not [name for name in host.remembered() if "/" in name]
    host.apply(wanted)


def test_killed_while_a_command_runs(tmp_path):
    """A real kill -9 in the middle of a restart: it is owed, the lock is free, all goes on."""
    host = FolderHost(tmp_path / "root", tmp_path / "fake")
    slow = host.fake / "bin/systemctl"
    quick = slow.read_text()
    slow.write_text(quick.replace("case", '[ "$1" != restart ] || sleep 60\ncase', 1))
    with host.session() as session:
        seen = session.ask(OLD)
        session.send(*wire.request(OLD, seen, owner="ana", reason="test"))
        for event in wire.events("gpu-1", session.lines):
            if event.get("verb") == "restart":
                break
        session.process.kill()
    slow.write_text(quick)
    seen = host.snapshot(OLD)
    assert (seen.owed, seen.lock, seen.interrupted) == (("a.service", "gone.service"), "", False)
    host.calls()
    host.apply(OLD)
    assert host.calls() == ["restart a.service", "restart gone.service"]
