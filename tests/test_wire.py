"""What is asked of a host and read back, by real shells on a folder."""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from folderhost import FolderHost, bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferfleet import probe, wire
from inferfleet.errors import ApplyError
from inferfleet.model import Artefact, Ensure, FileState, Snapshot

SHELLS = [name for name in ("dash", "bash") if shutil.which(name)]


@pytest.fixture(params=SHELLS)
def host(request, tmp_path):
    return FolderHost(tmp_path / "root", tmp_path / "fake", shell=request.param)


def lay(host: FolderHost, path: str, content: bytes = b"", mode: int = 0o644) -> None:
    where = Path(f"{host.root}{path}")
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_bytes(content)
    where.chmod(mode)


def test_a_probe_tells_kind_mode_and_digest_of_every_path(host):
    wanted = Artefact('/etc/it\'s a "$HOME" \\ ünï`id`;.conf', b"x")
    lay(host, wanted.path, b"x", 0o640)
    Path(host.root, "etc/link").symlink_to("/nowhere")
    Path(host.root, "etc/loop").symlink_to(host.root)
    Path(host.root, "etc/folder").mkdir()
    os.mkfifo(host.root / "etc/pipe")
    others = [Artefact(f"/etc/{name}", b"") for name in ("link", "loop", "folder", "pipe", "no")]

    seen = host.snapshot(bundle(wanted, *others))

    assert seen.files[wanted.path] == FileState(wanted.path, "file", 0o640, "", "", wanted.digest)
    kinds = [seen.files[a.path].kind for a in others]
    assert kinds == ["symlink", "symlink", "directory", "other", "absent"]
    assert not any(seen.files[a.path].digest for a in others)


NAMES = st.text(st.characters(exclude_characters="/\n\0", exclude_categories=("Cs",)), min_size=1)
FILES = st.dictionaries(
    NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) <= 255),
    st.binary(max_size=300),
    max_size=5,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FILES)
def test_odd_names_and_contents_arrive_as_they_are(files):
    with tempfile.TemporaryDirectory() as folder:
        host = FolderHost(Path(folder, "root"), Path(folder, "fake"), runs=False)
        wanted = bundle(*(Artefact(f"/opt/{name}", text) for name, text in files.items()))
        host.apply(wanted)
        there = {p.name: p.read_bytes() for p in host.root.glob("opt/*")}
        assert there == files
        seen = host.snapshot(wanted)
        assert {a.path: a.digest for a in wanted.artefacts} == {
            path: state.digest for path, state in seen.files.items()
        }
        assert set(seen.owned) == set(seen.files)


def test_a_bare_host_is_told_as_such(host):
    seen = host.snapshot(bundle())
    assert seen == Snapshot("gpu-1", {}, python=seen.python)
    assert tuple(map(int, seen.python.split("."))) >= (3, 11)


def test_ensures_that_fail_are_told_by_their_index(host):
    (host.root / "flag").touch()
    seen = host.snapshot(
        bundle(
            Ensure("holds", "true"),
            Ensure("fails", "echo noise; echo more >&2; exit 7", "true"),
            Artefact("/etc/a", b""),
            Ensure("reads its input", "read line && exit 0; exit 1", "true"),
            Ensure("a 'quoted' $one", "test \"$(echo 'a  b')\" = 'a  b'"),
            Ensure("a syntax error", "if", "true"),
        )
    )
    assert seen.failing == {1, 2, 4}


def test_a_folder_without_commands_has_no_failing_ensure(host):
    host.runs = False
    assert host.snapshot(bundle(Ensure("fails", "false", "true"))).failing == frozenset()


def test_what_a_former_run_left_is_told(host):
    state = host.root / "var/lib/inferfleet"
    (state / "transaction").mkdir(parents=True)
    manifest = {"generation": 7, "phase": "pilot", "files": {"/etc/a": {"restarts": ["a.service"]}}}
    (state / "current.json").write_text(json.dumps(manifest))
    (state / "owed").write_text('{"daemon-reload": "daemon-reload", "b.service": "reload"}')
    seen = host.snapshot(bundle())
    assert (seen.generation, seen.phase, seen.interrupted) == (7, "pilot", True)
    assert seen.owned == {"/etc/a": ("a.service",)}
    assert seen.owed == ("daemon-reload", "b.service")


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock(1)")
def test_a_lock_counts_only_while_it_is_held(host):
    lock = host.root / "var/lib/inferfleet/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"owner": "ana", "reason": "pilot", "time": "12:00", "pid": 1}))
    assert host.snapshot(bundle()).lock == ""
    with subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo; read x"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        holder.stdout.readline()
        assert host.snapshot(bundle()).lock == "ana since 12:00 (pilot)"
        holder.communicate(b"\n")


def test_a_probe_changes_nothing_and_can_be_asked_again(host):
    lay(host, "/etc/a", b"x")
    wanted = bundle(Artefact("/etc/a", b"x"), Ensure("fails", "false", "true"))
    before = host.tree()
    with host.session() as session:
        assert session.ask(wanted) == session.ask(wanted)
    assert host.tree() == before
    assert not (host.root / "var").exists()


def test_contents_are_fetched_of_files_alone(host):
    lay(host, "/etc/it's $1", bytes(range(256)))
    lay(host, "/etc/empty")
    os.mkfifo(host.root / "etc/pipe")
    (host.root / "etc/link").symlink_to(host.root / "etc/it's $1")
    paths = [f"/etc/{name}" for name in ("it's $1", "empty", "pipe", "link", "no")]
    with host.session() as session:
        session.ask(bundle())
        session.send(wire.fetch(paths))
        contents = wire.fetched("gpu-1", session.lines)
    assert contents == {**dict.fromkeys(paths, b""), paths[0]: bytes(range(256))}
    with pytest.raises(ApplyError, match=r"^gpu-1: the connection ended"):
        wire.fetched("gpu-1", [b"content ./etc/a"])


def test_half_a_probe_is_not_run(host):
    question = wire.question(bundle(Ensure("leaves a mark", f"touch {host.root}/mark", "true")))
    with host.session() as session:
        session.send(question[:-20])
        said, errors = session.process.communicate()
    assert (said, bool(errors)) == (b"", True)
    assert not (host.root / "mark").exists()


def test_nothing_is_read_ahead(host):
    """The pieces come one byte at a time, and all at once."""
    question = wire.question(bundle())
    with host.session() as session:
        session.send(*(bytes([byte]) for byte in question))
        first = wire.answer("gpu-1", session.lines)
    with host.session() as session:
        session.send(question + question)
        assert [wire.answer("gpu-1", session.lines) for _ in range(2)] == [first, first]


def test_a_host_without_python_or_with_an_old_one_is_refused(host):
    (host.fake / "bin/python3").unlink()
    (host.fake / "bin/python3").write_text("#!/bin/sh\necho Python 3.6.8\n")
    (host.fake / "bin/python3").chmod(0o755)
    seen = host.snapshot(bundle())
    assert seen.python == "3.6"
    with pytest.raises(ApplyError, match=r"^gpu-1: its python3 is 3\.6; 3\.8 or newer"):
        list(wire.request(bundle(), seen, owner="ana", reason="test"))
    with pytest.raises(ApplyError, match=r"^gpu-1: it has no python3"):
        list(wire.request(bundle(), Snapshot("gpu-1", {}), owner="ana", reason="test"))


GOOD = [b"path 81a4\troot\troot\t./etc/a", b"python /usr/bin/python3.11"]


def said(*lines: bytes, end: bytes = probe.END.encode()) -> list[bytes]:
    return [b"Welcome!", probe.END.encode(), probe.MARK.encode(), *lines, end]


def test_noise_is_tolerated_before_the_first_mark_only():
    seen = wire.answer("gpu-1", said(*GOOD))
    assert seen.files == {"/etc/a": FileState("/etc/a", "file", 0o644, "root", "root")}
    with pytest.raises(ApplyError, match=r"^gpu-1: it said something unexpected: 'Welcome!'"):
        wire.answer("gpu-1", said(b"Welcome!"))


@pytest.mark.parametrize(
    "line",
    [
        b"path 81a4\troot\t/etc/a",
        b"path zz\troot\troot\t./etc/a",
        b"failing one",
        b"owed {",
        b"owed 3",
        b"current.json []",
        b'current.json {"files": {"/a": {}}}',
        b"0123  ./etc/a",
        b"\xff\xfe",
        b"",
    ],
)
def test_garbage_is_refused(line):
    with pytest.raises(ApplyError, match=r"^gpu-1: it said something unexpected"):
        wire.answer("gpu-1", said(line))


@pytest.mark.parametrize("lines", [[], [b"noise"], said(*GOOD)[:-1]])
def test_an_early_end_is_an_error(lines):
    with pytest.raises(ApplyError, match=r"^gpu-1: the connection ended"):
        wire.answer("gpu-1", lines)


def test_only_blobs_that_differ_are_sent_each_once_and_secrets_nowhere_else():
    same, twin = Artefact("/etc/same", b"SAME"), Artefact("/etc/twin", b"SECRET", secret=True)
    wanted = bundle(same, twin, Artefact("/etc/other", b"SECRET", secret=True))
    files = {same.path: FileState(same.path, "file", digest=same.digest)}
    seen = Snapshot("gpu-1", files, python="3.11")
    source, line, *blobs = wire.request(wanted, seen, owner="ana", reason="test")
    assert blobs == [b"SECRET"]
    assert b"SECRET" not in source + line
    assert json.loads(line)["blobs"] == [[twin.digest, 6]]
    assert source.split(b"\n", 1)[0] == b"python %d" % len(wire.applier_source())


def test_after_an_interrupted_run_every_blob_is_sent():
    same = Artefact("/etc/same", b"SAME")
    files = {same.path: FileState(same.path, "file", digest=same.digest)}
    seen = Snapshot("gpu-1", files, python="3.11", interrupted=True)
    assert list(wire.request(bundle(same), seen, owner="", reason=""))[2:] == [b"SAME"]


def test_events_end_with_done_or_an_error():
    stage, done = b'{"event": "stage", "path": "/etc/a"}', b'{"event": "done", "changes": 1}'
    assert [e["event"] for e in wire.events("gpu-1", [stage, done, b"more"])] == ["stage", "done"]
    with pytest.raises(ApplyError, match=r"^gpu-1: connection lost while staging /etc/a; the next"):
        list(wire.events("gpu-1", [stage]))
    with pytest.raises(ApplyError, match=r"^gpu-1: connection lost while starting the applier"):
        list(wire.events("gpu-1", []))
    with pytest.raises(ApplyError, match=r"^gpu-1: disk on fire$"):
        list(wire.events("gpu-1", [stage, b'{"event": "failed", "message": "disk on fire"}']))
    for garbage in (b"Traceback", b"[]", b"3", b"{}"):
        with pytest.raises(ApplyError, match=r"^gpu-1: the applier said something unexpected"):
            list(wire.events("gpu-1", [garbage]))


def test_the_applier_is_sent_whole_or_not_run():
    source = wire.applier_source()
    compile(source, "applier", "exec")
    with pytest.raises(SyntaxError):
        compile(source[: len(source) // 2], "applier", "exec")
    assert source.rstrip().endswith(b".main())")
