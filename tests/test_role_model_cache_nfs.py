"""What the model cache exports, read by the real exportfs; and its folders over a real NFS server.

The kernel here may know no NFS: ganesha serves and libnfs reads, both in user space, in namespaces
for mounts and network of their own. Ganesha reads no exports file: what it is told is what the
rendered line says.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from test_role_model_cache import FOLDER, MODELS, bundles, text
from test_role_model_cache_fetch import FILES, KEPT, REVISION, models, run

EXPORTS = "/etc/exports.d/inferfleet-models.exports"
READER, STRANGER = "198.51.100.11", "127.0.0.1"  # a reader of the fleet, and no reader
OTHER = f"other@{REVISION}"
# $1: the root. Who asks a server at one of its own addresses comes from this same address.
ENTER = f"""\
set -e
cd "$1"
ip link set lo up
ip address add {READER}/32 dev lo
for folder in dev etc/exports.d run srv tmp var/lib/nfs; do mount -t tmpfs tmpfs $folder; done
mount -t proc proc proc
for name in null urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done
mkdir -p run/ganesha .{MODELS}
"""
EXPORTFS = f"""\
touch var/lib/nfs/etab var/lib/nfs/rmtab
cat > .{EXPORTS}
chroot . /usr/sbin/exportfs -ra
chroot . /usr/sbin/exportfs -s
"""
GANESHA = """\
cat > run/ganesha.conf
exec chroot . /usr/bin/ganesha.nfsd -F -f /run/ganesha.conf -L /run/ganesha.log -p /run/ganesha.pid
"""
EXPORT = """\
EXPORT {{ Export_Id = {id}; Path = {path}; Pseudo = {pseudo}; Tag = {tag}; Protocols = 4;
  Transports = TCP; SecType = sys; Access_Type = NONE; FSAL {{ Name = VFS; }}
  CLIENT {{ Clients = {clients}; Access_Type = {access}; Squash = {squash}; Protocols = 4; }} }}
"""
CORE = """\
NFS_CORE_PARAM { Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }
NFSv4 { Graceless = true; Only_Numeric_Owners = true; }
NFS_KRB5 { Active_krb5 = false; }
LOG { Default_Log_Level = EVENT; }
"""


def unavailable(reason: str) -> NoReturn:
    """Skip; fail instead where these tests are promised."""
    if os.environ.get("CI") or os.environ.get("INFERFLEET_REQUIRE_LAB") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def tools() -> Path | str:
    """The root that tests/tools/nfs fills; or why there is none."""
    if os.geteuid():
        return "not root: an NFS server opens files by their handles"
    if subprocess.run(["unshare", "-mn", "true"], capture_output=True, check=False).returncode:
        return "no namespaces for mounts and network here"
    tool = Path(__file__).parent / "tools" / "nfs"
    done = subprocess.run([tool], capture_output=True, text=True, timeout=300, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else f"no NFS: {done.stderr[-300:]}"


@pytest.fixture(scope="module")
def root() -> Path:
    found = tools()
    return unavailable(found) if isinstance(found, str) else found


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory):
    """What is put on the host that fetches from a disk carried in, and exports to two readers."""
    settings = "{hosts: [all], writer: store-01, directory: /media/disk, reserve_gib: 0}"
    return bundles(tmp_path_factory.mktemp("fleet"), settings)["store-01"]


def inside(root: Path, script: str) -> list[str]:
    """The command that runs a script at the root, where nobody else sees what it mounts."""
    return ["unshare", "--mount", "--net", "sh", "-c", ENTER + script, "sh", str(root)]


# The real exportfs


def exported(root: Path, exports: str) -> subprocess.CompletedProcess[str]:
    argv = inside(root, EXPORTFS)
    return subprocess.run(
        argv, input=exports, capture_output=True, text=True, timeout=30, check=False
    )


def test_exportfs_exports_to_the_readers_of_both_kinds_of_address_read_only(root, writer):
    done = exported(root, text(writer, EXPORTS))
    assert (done.returncode, done.stderr) == (0, ""), "neither an error nor a warning"
    found = dict(re.findall(rf"^{MODELS}\s+(\S+)\((.*)\)$", done.stdout, re.M))
    assert set(found) == {READER, "2001:db8::12"}
    assert len(done.stdout.splitlines()) == 2
    for options in found.values():
        assert {"ro", "sync", "root_squash", "no_subtree_check"} <= {*options.split(",")}
        assert "rw" not in options.split(",")


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("(ro,", "(r0,", 'unknown keyword "r0"'),
        ("root_squash)\n", "root_squash\n", "bad option list"),
        ("2001:db8::12", "2001:db8::zz", "Failed to resolve 2001:db8::zz"),
        (MODELS, f"{MODELS}2", f"Failed to stat {MODELS}2"),
    ],
)
def test_exportfs_would_say_what_is_wrong(root, writer, right, wrong, said):
    exports = text(writer, EXPORTS).rstrip("\n") + "\n"
    assert right in exports
    assert said in exported(root, exports.replace(right, wrong)).stderr


# A real NFS server


@dataclass(frozen=True)
class Server:
    """A running server; its files as seen from here, and a client beside it."""

    pid: int
    tools: Path

    def at(self, path: str) -> Path:
        return Path(f"/proc/{self.pid}/root{path}")

    def client(self, *argv: str) -> subprocess.CompletedProcess[bytes]:
        """A program of libnfs-utils, run to its end."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "chroot"]
        whole = [*enter, str(self.tools), *argv]
        return subprocess.run(whole, capture_output=True, timeout=20, check=False)

    def read(self, name: str) -> bytes:
        done = self.client("nfs-cat", place(name))
        assert done.returncode == 0, done.stderr
        return done.stdout


def place(name: str, path: str = MODELS, server: str = READER) -> str:
    return f"nfs://{server}{path}/{name}?version=4"


def ganesha_says(exports: str) -> str:
    """An exports file as ganesha is told it; and the same folder for writing, as `/control`."""
    path, *clients = exports.splitlines()[-1].split()
    (options,) = {client.partition("(")[2].rstrip(")") for client in clients}
    access = {"ro": "RO", "rw": "RW"}[options.split(",")[0]]
    squash = "Root_Squash" if "root_squash" in options.split(",") else "No_Root_Squash"
    addresses = ", ".join(client.partition("(")[0] for client in clients)
    one = {"id": 1, "path": path, "pseudo": path, "tag": "models", "clients": addresses}
    two = one | {"id": 2, "pseudo": "/control", "tag": "control"}
    return (
        CORE
        + EXPORT.format(**one, access=access, squash=squash)
        + EXPORT.format(**two, access="RW", squash="No_Root_Squash")
    )


@pytest.fixture(scope="module")
def server(root: Path, writer) -> Iterator[Server]:
    with subprocess.Popen(inside(root, GANESHA), stdin=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdin
            process.stdin.write(ganesha_says(text(writer, EXPORTS)))
            process.stdin.close()
            served = Server(process.pid, root)
            until_it_serves(process, served.at("/run/ganesha.log"))
            yield served
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def until_it_serves(process: subprocess.Popen[str], log: Path) -> None:
    end, said = time.monotonic() + 20, ""
    while "NFS SERVER INITIALIZED" not in said:
        assert process.poll() is None, "ganesha ended"
        assert time.monotonic() < end, said[-2000:]
        time.sleep(0.05)
        said = log.read_text() if log.exists() else ""


@pytest.fixture(scope="module")
def share(server: Server, writer, tmp_path_factory) -> Server:
    """Served is what the role's program fetched: one model, and another that was cut off."""
    disk = tmp_path_factory.mktemp("disk")
    for folder in (FOLDER, OTHER):
        for name in KEPT:
            path = disk / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(FILES[name])
        assert run("seal", disk / folder, folder.partition("@")[0], REVISION).returncode == 0
    (disk / OTHER / "tokenizer/tokenizer.json").write_bytes(b"[]")  # as many bytes, but others
    config = json.loads(text(writer, "/etc/inferfleet/model_cache/models.json"))
    config |= {"target": str(server.at(MODELS)), "source": {"directory": str(disk)}}
    done = fetched(config, disk / "models.json")
    assert done.returncode == 0, done.stderr
    config["models"] = [config["models"][0] | {"name": "other", "folder": OTHER}]
    assert fetched(config, disk / "models.json").returncode == models.TRY_AGAIN
    return server


def fetched(config, path: Path) -> subprocess.CompletedProcess[str]:
    path.write_text(json.dumps(config))
    return run("fetch", path)


def copied(share: Server, folder: str, names: list[str]) -> Path:
    """The files of a folder of the share, copied over NFS to a folder called FOLDER."""
    target = f"/tmp/{time.monotonic_ns()}/{FOLDER}"
    for name in names:
        share.at(f"{target}/{name}").parent.mkdir(parents=True, exist_ok=True)
        done = share.client("nfs-cp", place(f"{folder}/{name}"), f"{target}/{name}")
        assert done.returncode == 0, done.stderr
    return share.at(target)


def test_what_the_writer_fetched_is_read_back_whole(share):
    manifest = json.loads(share.read(f"{FOLDER}/{models.MANIFEST}"))
    assert sorted(manifest["files"]) == KEPT
    copy = copied(share, FOLDER, [*KEPT, models.MANIFEST])
    assert run("check", copy).returncode == 0
    done = run("verify", copy)
    assert done.returncode == 0, done.stderr


def test_a_reader_cannot_write_where_it_could_were_it_exported_so(share):
    source, name = f"{MODELS}/{FOLDER}/config.json", f"{FOLDER}/tokenizer.model"
    done = share.client("nfs-cp", source, place(name))
    assert done.returncode
    assert b"NFS4ERR_ROFS" in done.stderr
    assert not share.at(f"{MODELS}/{name}").exists()
    done = share.client("nfs-cp", source, place(name, "/control"))
    assert done.returncode == 0, done.stderr
    share.at(f"{MODELS}/{name}").unlink()


def test_a_host_that_is_no_reader_reads_nothing(share):
    name = f"{FOLDER}/config.json"
    assert share.read(name) == FILES["config.json"]
    done = share.client("nfs-cat", place(name, server=STRANGER))
    assert done.returncode
    assert b"NFS4ERR_NOENT" in done.stderr, "it does not even see the folder"
    assert done.stdout == b""


def test_a_copy_that_was_cut_off_is_not_complete(share):
    copy = copied(share, FOLDER, [models.MANIFEST, "config.json"])
    assert "model.safetensors is gone" in run("check", copy).stderr
    weights = share.read(f"{FOLDER}/model.safetensors")
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = run("check", copy)
    assert done.returncode == 1
    assert "model.safetensors has 512000 of 1024000 bytes" in done.stderr


def test_what_the_writer_has_not_finished_is_not_complete_under_any_name(share):
    listing = share.client("nfs-ls", place("")).stdout.decode()
    assert f"{OTHER}.partial" in listing
    assert not re.search(rf"{OTHER}$", listing, re.M)
    copy = copied(share, f"{OTHER}.partial", ["config.json", "model.safetensors"])
    done = run("check", copy)
    assert done.returncode == 1
    assert f"has no {models.MANIFEST}" in done.stderr
