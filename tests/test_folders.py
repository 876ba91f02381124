"""Hosts that are folders, as OpenSSH's client and paramiko see them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from inferfleet.lab.folders import FolderHost, FolderHosts

SIZE = 10 * 1024 * 1024
Ssh = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FolderHosts]:
    base = tmp_path_factory.mktemp("folders")
    with FolderHosts(base, ["gpu-1", "gpu-2"], {"GREETING": "hello"}) as lab:
        yield lab


@pytest.fixture
def host(lab: FolderHosts) -> FolderHost:
    return lab.hosts["gpu-1"]


@pytest.fixture(scope="module")
def argv(
    lab: FolderHosts, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[FolderHost], list[str]]:
    """The start of an ssh command line, in which nothing of the user's own counts."""
    if not shutil.which("ssh"):
        pytest.skip("OpenSSH's client is not installed")
    known = tmp_path_factory.mktemp("ssh") / "known_hosts"
    known.write_text("".join(host.known_hosts for host in lab.hosts.values()))
    options = ["BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes"]
    options += [f"UserKnownHostsFile={known}", "GlobalKnownHostsFile=/dev/null"]

    def start(host: FolderHost, key: Path | None = None) -> list[str]:
        fixed = ["ssh", "-F", "none", "-i", str(key or lab.key), "-p", str(host.port)]
        return [*fixed, *(f"-o{option}" for option in options), f"deploy@{host.address}"]

    return start


@pytest.fixture
def ssh(argv: Callable[..., list[str]], host: FolderHost) -> Ssh:
    def run(command: str, data: bytes = b"", **more: Path) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*argv(host, **more), command],
            input=data,
            capture_output=True,
            timeout=30,
            check=False,
        )

    return run


def login(
    lab: FolderHosts, host: FolderHost, key: paramiko.PKey | None = None
) -> paramiko.Transport:
    transport = paramiko.Transport((host.address, host.port))
    try:
        transport.start_client(timeout=10)
        assert transport.get_remote_server_key().fingerprint == host.fingerprint
        transport.auth_publickey("root", key or paramiko.Ed25519Key(filename=str(lab.key)))
    except BaseException:
        transport.close()
        raise
    return transport


@pytest.fixture
def transport(lab: FolderHosts, host: FolderHost) -> Iterator[paramiko.Transport]:
    transport = login(lab, host)
    yield transport
    transport.close()


def execute(transport: paramiko.Transport, command: str) -> paramiko.Channel:
    channel = transport.open_session(timeout=10)
    channel.settimeout(20)
    channel.exec_command(command)
    return channel


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs: one that is dead and not yet reaped does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, check=False)
    return shown.stdout.strip()[:1] not in (b"", b"Z")


def test_ssh_runs_a_command_in_the_hosts_folder(ssh: Ssh, host: FolderHost) -> None:
    done = ssh('pwd; echo "$INFERFLEET_ROOT $HOME $GREETING"; echo oops >&2; exit 7')
    assert done.returncode == 7
    home = host.root.parent / "home"
    assert done.stdout.decode().splitlines() == [str(host.root), f"{host.root} {home} hello"]
    assert done.stderr == b"oops\n"


def test_the_callers_environment_stays_outside(ssh: Ssh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_CALLER", "x")
    assert b"SECRET_OF_THE_CALLER" not in ssh("env").stdout


def test_ssh_carries_ten_megabytes_there_and_back(ssh: Ssh) -> None:
    data = os.urandom(SIZE)
    assert ssh("cat", data).stdout == data


def test_ssh_refuses_another_key(ssh: Ssh, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    done = ssh("echo in", key=other)
    assert (done.returncode, done.stdout) == (255, b"")
    assert b"Permission denied (publickey)" in done.stderr


def test_the_fingerprint_is_what_ssh_keygen_prints(host: FolderHost, tmp_path: Path) -> None:
    line = tmp_path / "line"
    line.write_text(host.known_hosts)
    shown = subprocess.run(["ssh-keygen", "-lf", line], capture_output=True, text=True, check=True)
    assert shown.stdout.split()[1] == host.fingerprint


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], b"shell request failed"),
        (["-s", "sftp"], b"subsystem request failed"),
        (["-W", "127.0.0.1:1"], b"administratively prohibited"),
        (["-N", "-oExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"], b"forwarding failed"),
    ],
)
def test_ssh_gets_nothing_but_commands(
    argv: Callable[..., list[str]], host: FolderHost, options: list[str], word: bytes
) -> None:
    *start, target = argv(host)
    flags = [o for o in options if o != "sftp"]
    done = subprocess.run(
        [*start, *flags, target, *(["sftp"] if "sftp" in options else [])],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 255
    assert word in done.stderr


def test_no_terminal_is_given(transport: paramiko.Transport) -> None:
    channel = transport.open_session()
    with pytest.raises(paramiko.SSHException):
        channel.get_pty()


def test_paramiko_is_refused_with_another_key(lab: FolderHosts, host: FolderHost) -> None:
    with pytest.raises(paramiko.AuthenticationException):
        login(lab, host, paramiko.ECDSAKey.generate())


def test_no_other_way_in(host: FolderHost) -> None:
    with paramiko.Transport((host.address, host.port)) as transport:
        transport.start_client(timeout=10)
        with pytest.raises(paramiko.BadAuthenticationType) as caught:
            transport.auth_none("root")
        assert caught.value.allowed_types == ["publickey"]
        with pytest.raises(paramiko.BadAuthenticationType):
            transport.auth_password("root", "root", fallback=False)


@pytest.mark.parametrize(
    ("command", "status"), [("true", 0), ("exit 200", 200), ("kill -9 $$", 137)]
)
def test_paramiko_sees_exit_statuses(
    transport: paramiko.Transport, command: str, status: int
) -> None:
    assert execute(transport, command).recv_exit_status() == status


def test_all_three_pipes_are_busy_at_once(transport: paramiko.Transport) -> None:
    """Ten megabytes in, ten out, one of errors, read one after the other by a slow client."""
    channel = execute(transport, "head -c 1000000 /dev/zero | tr '\\0' e >&2 & tee /dev/null; wait")
    data = os.urandom(SIZE)
    sender = threading.Thread(target=lambda: (channel.sendall(data), channel.shutdown_write()))
    sender.start()
    got = b"".join(iter(lambda: channel.recv(65536), b""))
    errors = b"".join(iter(lambda: channel.recv_stderr(65536), b""))
    sender.join()
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    assert errors == b"e" * 1_000_000
    assert channel.recv_exit_status() == 0


def test_quick_commands_are_answered_before_they_end(transport: paramiko.Transport) -> None:
    def many(got: list[int]) -> None:
        got += [execute(transport, f"exit {n}").recv_exit_status() for n in range(50)]

    results: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=many, args=(got,)) for got in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(50))] * 4


def test_a_conversation_goes_back_and_forth(transport: paramiko.Transport) -> None:
    channel = execute(transport, 'while read -r line; do echo "heard $line"; done; echo end')
    for word in (b"one", b"two"):
        channel.sendall(word + b"\n")
        assert channel.recv(100) == b"heard " + word + b"\n"
    channel.shutdown_write()
    assert channel.recv(100) == b"end\n"
    assert channel.recv_exit_status() == 0


def test_commands_of_one_connection_run_side_by_side(transport: paramiko.Transport) -> None:
    """Each waits for what only the other does."""
    first = execute(transport, "mkfifo a b; cat a; echo first > b")
    second = execute(transport, "until [ -p b ]; do :; done; echo second > a; cat b; rm a b")
    assert (first.recv(100), second.recv(100)) == (b"second\n", b"first\n")
    assert first.recv_exit_status() == second.recv_exit_status() == 0


def test_a_command_need_not_read_what_it_is_sent(
    transport: paramiko.Transport, host: FolderHost
) -> None:
    os.mkfifo(host.root / "go")
    channel = execute(transport, "exec <&-; echo deaf; cat go")
    assert channel.recv(100) == b"deaf\n"
    channel.sendall(b"x" * SIZE)
    (host.root / "go").write_text("went\n")
    assert channel.recv(100) == b"went\n"
    assert channel.recv_exit_status() == 0


def test_hosts_are_apart(lab: FolderHosts) -> None:
    one, two = lab.hosts.values()
    assert one.port != two.port
    assert one.fingerprint != two.fingerprint
    for host in (one, two):
        with login(lab, host) as transport:
            assert execute(transport, f"echo {host.name} > name").recv_exit_status() == 0
    assert [(h.root / "name").read_text() for h in (one, two)] == ["gpu-1\n", "gpu-2\n"]


def test_a_client_that_leaves_does_not_end_its_command(lab: FolderHosts, host: FolderHost) -> None:
    with login(lab, host) as transport:
        channel = execute(transport, "echo ready; cat > left-behind; echo done >> left-behind")
        channel.sendall(b"some\n")
        assert channel.recv(100) == b"ready\n"
    left = host.root / "left-behind"
    assert eventually(lambda: left.exists() and left.read_text() == "some\ndone\n")


def test_keys_stay_and_leaving_kills_what_runs(tmp_path: Path) -> None:
    begun = time.monotonic()
    with FolderHosts(tmp_path, ["a"]) as lab:
        before, key = lab.hosts["a"], lab.key.read_bytes()
        transport = login(lab, before)
        channel = execute(transport, "sleep 60 & echo $$ $!; wait")
        pids = [int(pid) for pid in channel.recv(100).split()]
    assert eventually(lambda: not any(map(alive, pids)))
    transport.close()
    with FolderHosts(tmp_path, ["a"]) as lab:
        assert lab.hosts["a"].fingerprint == before.fingerprint
        assert lab.key.read_bytes() == key
        assert lab.key.stat().st_mode & 0o777 == 0o600
    assert time.monotonic() - begun < 3


def test_twenty_hosts_answer_together(tmp_path: Path) -> None:
    names = [f"h{number}" for number in range(20)]
    with FolderHosts(tmp_path, names) as lab:
        got: dict[str, bytes] = {}

        def visit(host: FolderHost) -> None:
            with login(lab, host) as transport:
                got[host.name] = execute(transport, "basename $(dirname $PWD)").recv(100)

        threads = [threading.Thread(target=visit, args=(h,)) for h in lab.hosts.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {name: f"{name}\n".encode() for name in names}
