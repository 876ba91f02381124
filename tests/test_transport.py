"""The transport against real sshd processes, and against the machine the tests run on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import sshd
from sshd import Field, Sshd, auth_attempts, keygen, until

from inferfleet.errors import Error, TransportError
from inferfleet.hostkeys import KnownHosts
from inferfleet.model import Host, Secret
from inferfleet.transport import HostKey, Options, connect, fingerprint, trust

pytestmark = pytest.mark.skipif(not sshd.AVAILABLE, reason=sshd.MISSING)
PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    until(lambda: not set(threading.enumerate()) - before, "no thread is left", timeout=2)


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Field]:
    with sshd.open_field(tmp_path) as field:
        yield field


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not shutil.which("ssh-agent"):
        pytest.skip("needs ssh-agent")
    sock = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL)
    until(sock.exists, "the agent's socket")
    monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
    yield
    process.terminate()
    process.wait()


def ssh_add(key: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(key)], check=True, timeout=20)


def encrypt(key: Path) -> None:
    command = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(key)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)


def refusal(host: Host, options: Options) -> str:
    """The message of a connect that must fail; one line that begins with the host."""
    with pytest.raises(TransportError) as caught:
        connect(host, options).close()
    message = str(caught.value)
    assert message.startswith(f"{host.name}: ")
    assert "\n" not in message
    return message


def whoami(host: Host, options: Options) -> int:
    """Log in, run something, and give the exit status back."""
    with connect(host, options) as transport:
        return transport.run("exit 7").status


# --- running commands ---------------------------------------------------------------------------


@pytest.fixture(params=["ssh", "local"])
def place(request: pytest.FixtureRequest, ground: Field) -> tuple[Host, Options]:
    if request.param == "local":
        return Host(name="gpu-01", address="127.0.0.1", connection="local"), ground.options()
    return ground.host(ground.sshd()), ground.options()


def test_importing_does_not_load_paramiko() -> None:
    code = "import sys, inferfleet.transport; sys.exit('paramiko' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_run_gives_status_output_and_errors(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport:
        done = transport.run("cat; echo oops >&2; exit 3", input=b"abc\n\x00\xff")
    assert (done.status, done.stdout, done.stderr) == (3, b"abc\n\x00\xff", "oops\n")


def test_a_command_that_reads_no_input(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport:
        assert transport.run("exit 4", input=bytes(5_000_000)).status == 4


def test_quoting_survives(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport:
        command = """printf '%s|' "$(echo 'it'"'"'s')" '$HOME' "a\nb" # comment"""
        assert transport.run(command).stdout == b"it's|$HOME|a\nb|"


def test_much_in_all_directions_at_once(place: tuple[Host, Options]) -> None:
    data = os.urandom(1 << 20) * 10
    command = "head -c 1000000 /dev/zero >&2; cat"
    with connect(*place) as transport:
        done = transport.run(command, input=data)
        assert done.stdout == data
        assert len(done.stderr) == 64 * 1024
        with transport.start(command) as session:  # nobody reads while we send
            session.send(data)
            session.end()
            assert sum(len(line) + 1 for line in session.lines()) - len(data) in (0, 1)
            assert session.wait(10) == 0


def test_lines_arrive_as_they_are_made(place: tuple[Host, Options]) -> None:
    loop = 'while read -r x; do echo "<$x>"; done; printf "no newline"'
    with connect(*place) as transport, transport.start(loop) as session:
        lines = session.lines()
        for word in (b"one", b"two", b"three"):
            session.send(word + b"\n")
            assert next(lines) == b"<" + word + b">"
        session.end()
        assert list(lines) == [b"no newline"]
        assert session.wait(5) == 0


def test_turns_count_round_trips(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport, transport.start("cat") as session:
        session.send(b"a\n")
        session.send(b"b\nc\n")
        lines = session.lines()
        assert [next(lines) for _ in range(3)] == [b"a", b"b", b"c"]
        assert session.turns == 1
        session.end()
        assert list(lines) == []
        assert session.wait(5) == 0
        assert session.turns == 1


def test_commands_that_take_too_long(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport:
        with pytest.raises(TransportError, match=r"gpu-01: .* within 0\.2 s"):
            transport.run("sleep 20", timeout=0.2)
        with transport.start("sleep 20") as session:
            with pytest.raises(TransportError, match=r"within 0\.1 s"):
                session.wait(0.1)
            with pytest.raises(TransportError, match=r"within 0\.1 s"):
                next(session.lines(timeout=0.1))


def test_a_command_that_a_signal_ends(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport:
        assert transport.run("kill -9 $$").status < 0


def test_sending_to_a_command_that_is_gone(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport, transport.start("echo broken >&2; exit 1") as session:
        assert session.wait(5) == 1
        with pytest.raises(TransportError, match=r"gpu-01: the command ended .*\nbroken"):
            session.send(bytes(5_000_000))  # more than any window


def test_several_commands_at_once(place: tuple[Host, Options]) -> None:
    with connect(*place) as transport, ThreadPoolExecutor(5) as pool:
        done = pool.map(lambda n: transport.run(f"cat; exit {n}", input=b"x" * 100_000), range(5))
        assert [(d.status, len(d.stdout)) for d in done] == [(n, 100_000) for n in range(5)]


def test_a_local_command_does_not_outlive_its_session(tmp_path: Path) -> None:
    host = Host(name="here", address="127.0.0.1", connection="local")
    marker = tmp_path / "pid"
    command = f"sleep 60 & echo $! >{marker}; wait"
    with connect(host, Options()) as transport, transport.start(command):
        until(lambda: marker.exists() and marker.read_text().strip(), "the child's pid")
    pid = marker.read_text().strip()
    until(lambda: not Path(f"/proc/{pid}/stat").exists(), "the child is gone")


# --- logging in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_login_by_key(ground: Field, kind: str) -> None:
    key = keygen(ground.folder / "other", kind)
    ground.authorized.write_text(sshd.public(key) + "\n")
    assert whoami(ground.host(ground.sshd(), key=str(key)), ground.options()) == 7


def test_login_by_the_default_identity(ground: Field, tmp_path: Path) -> None:
    host = ground.host(ground.sshd(), key=None)
    assert "no key to log in with" in refusal(host, ground.options())
    (tmp_path / "home/.ssh").mkdir(parents=True)
    shutil.copy(ground.key, tmp_path / "home/.ssh/id_ed25519")
    assert whoami(host, ground.options()) == 7


@pytest.mark.usefixtures("agent")
def test_login_by_the_agent(ground: Field) -> None:
    ssh_add(ground.key)
    ground.key.unlink()
    assert whoami(ground.host(ground.sshd(), key=None), ground.options()) == 7


@pytest.mark.usefixtures("agent")
@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_an_encrypted_key_that_the_agent_holds(ground: Field, kind: str) -> None:
    key = keygen(ground.folder / "other", kind)
    ground.authorized.write_text(sshd.public(key) + "\n")
    for number in range(7):  # more than MaxAuthTries, so that order matters
        ssh_add(keygen(ground.folder / f"noise-{number}"))
    ssh_add(key)
    encrypt(key)
    Path(f"{key}.pub").unlink()
    assert whoami(ground.host(ground.sshd(), key=str(key)), ground.options()) == 7


def test_an_encrypted_key_and_no_agent(ground: Field) -> None:
    encrypt(ground.key)
    message = refusal(ground.host(ground.sshd()), ground.options())
    assert f"key {ground.key} is encrypted" in message
    assert f"ssh-add {ground.key}" in message


def test_a_key_that_is_not_there(ground: Field) -> None:
    message = refusal(ground.host(ground.sshd(), key="/nonexistent/key"), ground.options())
    assert "key file /nonexistent/key does not exist" in message


def test_a_file_that_is_no_key(ground: Field) -> None:
    ground.key.write_text("not a key\n")
    message = refusal(ground.host(ground.sshd()), ground.options())
    assert f"{ground.key} is not a private key" in message


def test_a_key_the_host_does_not_know(ground: Field, capfd: pytest.CaptureFixture[str]) -> None:
    ground.authorized.write_text("")
    host = ground.host(ground.sshd(), user="root")
    assert f"root was not let in with key {ground.key}" in refusal(host, ground.options())
    assert capfd.readouterr().err == ""


def sign(ground: Field, subject: Path, *options: str) -> Path:
    """A certificate for a key by a new CA; gives the CA's key pair."""
    authority = keygen(ground.folder / "ca")
    command = ["ssh-keygen", "-q", "-s", str(authority), "-I", "test", *options, f"{subject}.pub"]
    subprocess.run(command, check=True, timeout=20)
    return authority


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_login_by_certificate(ground: Field, kind: str) -> None:
    key = keygen(ground.folder / "other", kind)
    authority = sign(ground, key, "-n", ground.host(NOWHERE).user or "")
    ground.authorized.write_text(f"cert-authority {sshd.public(authority)}\n")
    server = ground.sshd()
    assert whoami(ground.host(server, key=str(key)), ground.options()) == 7
    assert "ID test" in server.log


def test_a_certificate_that_ssh_config_names(ground: Field) -> None:
    authority = sign(ground, ground.key, "-n", ground.host(NOWHERE).user or "")
    elsewhere = ground.folder / "elsewhere.pub"
    Path(f"{ground.key}-cert.pub").rename(elsewhere)
    ground.authorized.write_text(f"cert-authority {sshd.public(authority)}\n")
    ground.config = f"Host *\n CertificateFile {elsewhere}\n"
    assert whoami(ground.host(ground.sshd()), ground.options()) == 7


# --- host keys ----------------------------------------------------------------------------------


def test_an_unknown_host_key(ground: Field) -> None:
    server = ground.sshd(known=False)
    message = refusal(ground.host(server), ground.options())
    print_ = sshd.fingerprint(server.host_keys[0])
    assert message == (
        f"gpu-01: its host key is unknown: {print_} (ssh-ed25519). "
        "Compare it on the host's console, then: inferfleet trust gpu-01"
    )
    assert auth_attempts(server) == []


def test_a_changed_host_key(ground: Field) -> None:
    server = ground.sshd(known=False)
    old = ground.host_key()
    ground.known.write_text(f"[{server.address}]:{server.port} {sshd.public(old)}\n")
    message = refusal(ground.host(server), ground.options())
    shown, expected = sshd.fingerprint(server.host_keys[0]), sshd.fingerprint(old)
    assert f"it showed {shown} (ssh-ed25519), expected {expected} (ssh-ed25519)" in message
    assert "attack" in message
    assert message.endswith("inferfleet trust gpu-01 --replace")
    assert auth_attempts(server) == []


def test_a_revoked_host_key(ground: Field) -> None:
    server = ground.sshd()
    ground.known.write_text(server.known_line + f"@revoked * {sshd.public(server.host_keys[0])}\n")
    assert "revoked" in refusal(ground.host(server), ground.options())
    assert auth_attempts(server) == []


def test_the_log_would_show_an_attempt(ground: Field) -> None:
    server = ground.sshd()
    whoami(ground.host(server), ground.options())
    assert auth_attempts(server)


def test_only_types_that_are_known_are_asked_for(ground: Field) -> None:
    keys = ground.host_key("ed25519"), ground.host_key("ecdsa")
    server = ground.sshd(keys=keys, known=False)
    ground.known.write_text(f"[{server.address}]:{server.port} {sshd.public(keys[1])}\n")
    assert whoami(ground.host(server), ground.options()) == 7


def test_fingerprints_in_the_inventory(ground: Field) -> None:
    keys = ground.host_key("ed25519"), ground.host_key("rsa")
    server = ground.sshd(keys=keys, known=False)
    options = ground.options()
    for key in keys:
        assert whoami(ground.host(server, host_keys=(sshd.fingerprint(key),)), options) == 7
    before = len(auth_attempts(server))
    ground.known.write_text(server.known_line)  # does not help: only the pins count
    message = refusal(ground.host(server, host_keys=("SHA256:other",)), options)
    assert f"showed {sshd.fingerprint(keys[0])} (ssh-ed25519), expected SHA256:other" in message
    assert len(auth_attempts(server)) == before


def certified(ground: Field, *options: str) -> tuple[Sshd, Path]:
    key = ground.host_key()
    authority = sign(ground, key, "-h", *options)
    return ground.sshd(f"HostCertificate {key}-cert.pub", keys=(key,), known=False), authority


def test_a_host_certificate(ground: Field) -> None:
    server, authority = certified(ground, "-n", "127.0.7.1")
    line = f"@cert-authority *127.0.7.* {sshd.public(authority)}\n"
    ground.known.write_text(line)
    assert whoami(ground.host(server), ground.options()) == 7
    ground.known.write_text(line + f"@revoked * {sshd.public(authority)}\n")
    assert "unknown" in refusal(ground.host(server), ground.options())


@pytest.mark.parametrize("flaw", ["expired", "name", "authority"])
def test_a_host_certificate_that_proves_nothing(ground: Field, flaw: str) -> None:
    name = "192.0.2.1" if flaw == "name" else "127.0.7.1"
    until_ = "20200101:20210101" if flaw == "expired" else "+1h"
    server, authority = certified(ground, "-n", name, "-V", until_)
    other = keygen(ground.folder / "another") if flaw == "authority" else authority
    ground.known.write_text(f"@cert-authority * {sshd.public(other)}\n")
    assert "its host key is unknown" in refusal(ground.host(server), ground.options())
    assert auth_attempts(server) == []


def test_fingerprint_and_trust(ground: Field) -> None:
    keys = ground.host_key("ed25519"), ground.host_key("ecdsa"), ground.host_key("rsa")
    server = ground.sshd(keys=keys, known=False)
    host, options = ground.host(server), ground.options()
    found = fingerprint(host, options)
    assert [key.fingerprint for key in found] == [sshd.fingerprint(key) for key in keys]
    assert [key.type for key in found] == ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"]
    assert auth_attempts(server) == []
    ground.known.write_text(trust("", found))
    assert whoami(host, options) == 7
    assert fingerprint(Host("here", "127.0.0.1", connection="local"), options) == []


# --- the way there ------------------------------------------------------------------------------

NOWHERE = Sshd("127.0.0.1", 1, Path(), (), None)  # type: ignore[arg-type]


def jump_config(ground: Field, *jumps: Sshd) -> str:
    blocks = [
        f"Host jump-{n}\n HostName {j.address}\n Port {j.port}\n IdentityFile {ground.key}\n"
        for n, j in enumerate(jumps)
    ]
    names = ",".join(f"jump-{n}" for n in range(len(jumps)))
    return "".join(blocks) + f"Host gpu-01\n ProxyJump {names}\n"


@pytest.mark.parametrize("count", [1, 2])
def test_through_jump_hosts(ground: Field, count: int) -> None:
    jumps = [ground.sshd() for _ in range(count)]
    server = ground.sshd()
    ground.config = jump_config(ground, *jumps)
    with connect(ground.host(server), ground.options()) as transport:
        data = os.urandom(2_000_000)
        assert transport.run("cat", input=data).stdout == data
    for way in (*jumps, server):
        assert way.log.count("Accepted publickey") == 1


def test_a_jump_host_must_be_known(ground: Field) -> None:
    jump, server = ground.sshd(known=False), ground.sshd()
    ground.config = jump_config(ground, jump)
    message = refusal(ground.host(server), ground.options())
    assert message.startswith("gpu-01: jump host jump-0: its host key is unknown: SHA256:")
    assert auth_attempts(jump) == []
    assert "Connection from" not in server.log


def test_behind_a_jump_host_keys_are_checked_and_nothing_may_answer(ground: Field) -> None:
    jump, server = ground.sshd(), ground.sshd(known=False)
    ground.config = jump_config(ground, jump)
    assert "gpu-01: its host key is unknown" in refusal(ground.host(server), ground.options())
    server.stop()
    message = refusal(ground.host(server), ground.options())
    assert f"its jump host cannot reach {server.address} port {server.port}" in message


def test_jump_hosts_that_loop(ground: Field) -> None:
    ground.config = "Host *\n ProxyJump other.example.com\n"
    assert "jump hosts" in refusal(ground.host(NOWHERE), ground.options())


def test_through_a_proxy_command(ground: Field) -> None:
    relay, server = ground.sshd(), ground.sshd()
    ground.config = (
        f"Host {server.address}\n ProxyCommand ssh -F none -i {ground.key} -W %h:%p "
        f"-o UserKnownHostsFile={ground.known} -p {relay.port} {relay.address}\n"
    )
    assert whoami(ground.host(server), ground.options()) == 7
    assert "Accepted publickey" in relay.log
    ground.config = f"Host {server.address}\n ProxyCommand false\n"
    assert "ended the connection" in refusal(ground.host(server), ground.options())


def test_ssh_config_names_the_rest(ground: Field) -> None:
    server = ground.sshd()
    (ground.folder / "more").write_text(f"Port {server.port}\n")
    ground.config = (
        f"Host gpu-alias\n HostName {server.address}\n User {ground.host(server).user}\n"
        f" Include {ground.folder}/mor*\n IdentityFile {ground.key}\n"
    )
    host = Host(name="gpu-01", address="gpu-alias")
    assert whoami(host, ground.options()) == 7
    by_name = Host(name="gpu-alias", address=server.address)
    assert whoami(by_name, ground.options()) == 7


def test_the_inventory_wins_over_ssh_config(ground: Field) -> None:
    ground.config = "Host *\n Port 1\n User nobody-at-all\n IdentityFile /nonexistent\n"
    assert whoami(ground.host(ground.sshd()), ground.options()) == 7


def test_files_that_ssh_config_names(ground: Field) -> None:
    server = ground.sshd(known=False)
    other = ground.folder / "other_known_hosts"
    other.write_text(f"rack-7 {sshd.public(server.host_keys[0])}\n")
    ground.config = f"Host *\n UserKnownHostsFile {other}\n HostKeyAlias rack-7\n"
    assert whoami(ground.host(server), ground.options()) == 7


def test_a_broken_ssh_config(ground: Field) -> None:
    ground.config = "Host *\n !!\n"
    assert "ssh_config" in refusal(ground.host(NOWHERE), ground.options())


# --- what goes wrong ----------------------------------------------------------------------------


def test_nothing_listens(ground: Field) -> None:
    host = Host("gpu-01", "127.0.7.9", port=sshd.free_port("127.0.7.9"))
    message = refusal(host, ground.options())
    assert f"127.0.7.9 port {host.port} refused the connection" in message


@pytest.mark.parametrize("address", ["no-such-host.invalid", "x" * 70 + ".example.com"])
def test_a_name_that_does_not_resolve(ground: Field, address: str) -> None:
    message = refusal(Host("gpu-01", address), ground.options())
    assert f"its address {address!r} does not resolve" in message


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"])
def test_something_else_listens(ground: Field, answer: bytes | None) -> None:
    with socket.create_server(("127.0.7.9", 0)) as server:
        port = server.getsockname()[1]
        clients = []

        def serve() -> None:
            client, _ = server.accept()
            clients.append(client)
            if answer:
                client.sendall(answer)
                if not answer.startswith(b"SSH"):
                    client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        options = ground.options(connect_timeout=0.3)
        message = refusal(Host("gpu-01", "127.0.7.9", port=port), options)
        thread.join()
        for client in clients:
            client.close()
    hung = answer is None or answer.startswith(b"SSH")
    assert ("within 0.3 s" if hung else "ended the connection") in message


def test_a_full_listen_queue_times_out(ground: Field) -> None:
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.7.9", 0))
        server.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        host = Host("gpu-01", "127.0.7.9", port=server.getsockname()[1])
        message = refusal(host, ground.options(connect_timeout=0.3))
    assert f"127.0.7.9 port {host.port} did not answer within 0.3 s" in message


def test_the_session_is_killed(ground: Field) -> None:
    server = ground.sshd()
    with connect(ground.host(server), ground.options()) as transport:
        with transport.start("echo started; exec sleep 60") as session:
            lines = session.lines()
            assert next(lines) == b"started"
            server.cut()
            with pytest.raises(TransportError, match="gpu-01: connection lost"):
                next(lines)
            with pytest.raises(TransportError, match="gpu-01: connection lost"):
                session.wait(5)
            with pytest.raises(TransportError, match="gpu-01: connection lost"):
                session.send(b"x")
        with pytest.raises(TransportError, match="gpu-01: connection lost"):
            transport.run("true")


def test_the_connection_breaks_while_we_send(ground: Field) -> None:
    server = ground.sshd()
    command = "echo started; exec sleep 60"
    way = connect(ground.host(server), ground.options())
    with way as transport, transport.start(command) as session:
        assert next(session.lines()) == b"started"
        killer = threading.Timer(0.1, server.cut)
        killer.start()
        with pytest.raises(TransportError, match="gpu-01: connection lost"):
            session.send(bytes(20_000_000))
        killer.join()


def test_a_peer_that_falls_silent(ground: Field) -> None:
    server = ground.sshd()
    command = "echo started; exec sleep 60"
    way = connect(ground.host(server), ground.options(keepalive=0.2))
    with way as transport, transport.start(command) as session:
        lines = session.lines()
        assert next(lines) == b"started"
        pids = server.sessions()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            ground.stack.callback(os.kill, pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(TransportError, match=r"lost: no sign of life for 0\.6 s"):
            next(lines)
        assert time.monotonic() - started < 5


def test_a_quiet_peer_that_lives_is_kept(ground: Field) -> None:
    with connect(ground.host(ground.sshd()), ground.options(keepalive=0.2)) as transport:
        assert transport.run("sleep 1.5; echo done").stdout == b"done\n"


def test_many_hosts_at_once(ground: Field) -> None:
    servers = [ground.sshd() for _ in range(20)]
    options = ground.options()
    hosts = [ground.host(s, name=f"gpu-{n:02}") for n, s in enumerate(servers)]
    hosts[3] = replace(hosts[3], port=sshd.free_port("127.0.7.99"), address="127.0.7.99")

    def ask(host: Host) -> str:
        try:
            with connect(host, options) as transport:
                return transport.run("echo $SSH_CONNECTION").stdout.split()[2].decode()
        except TransportError as error:
            return error.host

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, hosts))
    assert answers == ["gpu-03" if n == 3 else host.address for n, host in enumerate(hosts)]


def test_many_hosts_through_one_jump_host(ground: Field) -> None:
    jump = ground.sshd("MaxStartups 10")  # the first value counts
    servers = [ground.sshd() for _ in range(20)]
    ground.config = jump_config(ground, jump).replace("Host gpu-01", "Host gpu-*")
    options = ground.options()
    hosts = [ground.host(s, name=f"gpu-{n:02}") for n, s in enumerate(servers)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda host: whoami(host, options), hosts)) == [7] * 20


# --- sudo ---------------------------------------------------------------------------------------

SUDO = r"""#!/bin/sh
printf '%s\n' "$*" >>{folder}/argv
ask= prompt=
while [ $# -gt 0 ]; do
  case $1 in -n) shift;; -S) ask=1; shift;; -p) prompt=$2; shift 2;; --) shift; break;; esac
done
[ -f {folder}/refuse ] && {{ cat {folder}/refuse >&2; exit 1; }}
[ -f {folder}/free ] && exec env BECAME=root "$@"
[ -n "$ask" ] || {{ echo "sudo: a password is required" >&2; exit 1; }}
echo "We trust you have received the usual lecture." >&2
for try in 1 2 3; do
  printf %s "$prompt" >&2
  read -r given || {{ echo "sudo: no password was provided" >&2; exit 1; }}
  [ "$given" = "$(cat {folder}/password)" ] && exec env BECAME=root "$@"
  echo "Sorry, try again." >&2
done
echo "sudo: 3 incorrect password attempts" >&2
exit 1
"""


@pytest.fixture
def sudo(ground: Field) -> Iterator[Field]:
    """A field whose sshd finds a stand-in for sudo that asks for a password."""
    script = ground.folder / "bin/sudo"
    script.parent.mkdir()
    script.write_text(SUDO.format(folder=ground.folder))
    script.chmod(0o755)
    (ground.folder / "password").write_text(PASSWORD)
    return ground  # type: ignore[return-value]


def become(ground: Field, **changes: object) -> Host:
    return ground.host(ground.sshd(), become="sudo", user=ground.host(NOWHERE).user, **changes)


def test_sudo_without_a_password(sudo: Field) -> None:
    (sudo.folder / "free").touch()
    with connect(become(sudo), sudo.options()) as transport:
        done = transport.run("echo $BECAME; cat; echo oops >&2; exit 5", input=b"data")
        assert (done.status, done.stdout, done.stderr) == (5, b"root\ndata", "oops\n")
        assert transport.run("echo $BECAME", become=False).stdout == b"\n"
    assert (sudo.folder / "argv").read_text().startswith("-n -- sh -c ")


@pytest.mark.parametrize("free", [False, True], ids=["asked", "not asked"])
def test_sudo_with_a_password(sudo: Field, free: bool) -> None:
    if free:
        (sudo.folder / "free").touch()
    host = become(sudo, become_password=Secret("env", "P"))
    data = os.urandom(1 << 20)
    with connect(host, sudo.options(become_password=lambda _: PASSWORD)) as transport:
        done = transport.run("cat; echo oops >&2; exit 5", input=data)
        assert (done.status, done.stdout == data, done.stderr) == (5, True, "oops\n")
        with transport.start("cat") as session:
            session.send(b"one\n")
            assert next(session.lines()) == b"one"
            session.end()
            assert session.wait(5) == 0
            assert session.turns == 1
    assert PASSWORD not in (sudo.folder / "argv").read_text()


def test_sudo_with_the_wrong_password(sudo: Field) -> None:
    host = become(sudo, become_password=Secret("env", "P"))
    with connect(host, sudo.options(become_password=lambda _: "wrong")) as transport:
        for attempt in (
            lambda: transport.run("echo ran"),
            lambda: transport.start("echo ran").send(b"x"),
            lambda: list(transport.start("echo ran").lines()),
            lambda: transport.start("echo ran").wait(),
        ):
            with pytest.raises(TransportError) as caught:
                attempt()
            assert str(caught.value) == f"gpu-01: sudo refused the password of {host.user}"
    argv = (sudo.folder / "argv").read_text()
    assert "wrong" not in argv


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (None, "set become_password"),
        ("sudo: a terminal is required to read the password; use -S", "set become_password"),
        ("sudo: sorry, you must have a tty to run sudo", "!requiretty"),
        ("worker is not in the sudoers file.", "add a rule"),
        ("Sorry, user worker is not allowed to execute '/bin/sh' as root.", "add a rule"),
        ("sudo: unable to stat /etc/sudoers: odd", "sudo did not run the command: sudo: unable"),
    ],
)
def test_sudo_that_refuses(sudo: Field, said: str | None, wanted: str) -> None:
    if said:
        (sudo.folder / "refuse").write_text(said + "\n")
    with connect(become(sudo), sudo.options()) as transport:
        with transport.start("cat") as session:
            with pytest.raises(TransportError, match=r"gpu-01: .*sudo") as caught:
                list(session.lines())
            assert wanted in str(caught.value)
            with pytest.raises(TransportError, match=r"gpu-01: .*sudo") as caught:
                session.send(b"question\n")
            assert wanted in str(caught.value)
        with pytest.raises(TransportError) as caught:
            transport.run("cat", input=bytes(1 << 20))
        assert wanted in str(caught.value)


def test_no_sudo_on_the_host(ground: Field) -> None:
    if Path("/usr/bin/sudo").exists():
        pytest.skip("sudo is installed here")
    way = connect(become(ground), ground.options())
    with way as transport, pytest.raises(TransportError, match="gpu-01: sudo is not installed"):
        transport.run("true")


# --- known_hosts --------------------------------------------------------------------------------

KEY = "AAAAC3NzaC1lZDI1NTE5AAAAIE9zA6N+dKF69IiUG7tHXrQDlMv8m7G+rduOayWRoUKH"
OTHER = "AAAAC3NzaC1lZDI1NTE5AAAAIE9zA6N+dKF69IiUG7tHXrQDlMv8m7G+rduOayWRoUKI"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("gpu-01.example.com", True),
        ("GPU-01.Example.com", True),
        ("other.example.com,gpu-01.example.com,192.0.2.1", True),
        ("*.example.com", True),
        ("gpu-??.example.com", True),
        ("gpu-?.example.com", False),
        ("*.example.com,!gpu-01*", False),
        ("!gpu-02*,*.example.com", True),
        ("!gpu-01.example.com", False),
        ("[gpu-01.example.com]:22", False),
        ("gpu-01", False),
        ("gpu-01[.]example.com", False),
        ("#gpu-01.example.com", False),
    ],
)
def test_known_hosts_names_as_ssh_keygen_reads_them(
    names: str, found: bool, tmp_path: Path
) -> None:
    file = tmp_path / "known"
    file.write_text(f"# a comment\n\n{names} ssh-ed25519 {KEY} its comment\nbroken line\n")
    assert bool(list(KnownHosts(file.read_text()).find("gpu-01.example.com"))) is found
    command = ["ssh-keygen", "-F", "gpu-01.example.com", "-f", str(file)]
    judge = subprocess.run(command, capture_output=True, check=False, timeout=20)
    assert (judge.returncode == 0) is found


def test_hashed_known_hosts(tmp_path: Path) -> None:
    file = tmp_path / "known"
    file.write_text(f"gpu-01.example.com ssh-ed25519 {KEY}\n[192.0.2.1]:2222 ssh-ed25519 {OTHER}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(file)], check=True, capture_output=True)
    assert "example" not in file.read_text()
    known = KnownHosts(file.read_text())
    assert [e.key for e in known.find("gpu-01.example.com")] == [KEY]
    assert [e.key for e in known.find("[192.0.2.1]:2222")] == [OTHER]
    assert list(known.find("192.0.2.1")) == []


def test_a_large_known_hosts_is_read_quickly() -> None:
    text = "".join(f"host-{n}.example.com,192.0.2.{n} ssh-ed25519 {KEY}\n" for n in range(10_000))
    started = time.process_time()  # not the clock's: the machine may be busy with other tests
    known = KnownHosts(text)
    assert len(list(known.find("host-9999.example.com"))) == 1
    assert time.process_time() - started < 0.5


def entry(name: str, key: str = KEY) -> HostKey:
    return HostKey("ssh-ed25519", "SHA256:unused", f"{name} ssh-ed25519 {key}")


def test_trust_adds_once_and_keeps_the_rest() -> None:
    text = f"# mine\nother ssh-ed25519 {OTHER}"
    once = trust(text, [entry("gpu-01")])
    assert once == f"{text}\ngpu-01 ssh-ed25519 {KEY}\n"
    assert trust(once, [entry("gpu-01")]) == once
    assert trust(once, [entry("gpu-01")], replace=True) == once


def test_trust_replaces_only_when_told(tmp_path: Path) -> None:
    hashed = tmp_path / "known"
    hashed.write_text(f"gpu-01 ssh-ed25519 {OTHER}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(hashed)], check=True, capture_output=True)
    kept = f"*.example.com ssh-ed25519 {OTHER}\n@revoked gpu-01 ssh-ed25519 {OTHER}\n"
    old = f"GPU-01,192.0.2.1 ssh-ed25519 {OTHER} comment\n{kept}{hashed.read_text()}"
    with pytest.raises(Error, match="another host key is recorded for gpu-01"):
        trust(old, [entry("gpu-01")])
    new = f"192.0.2.1 ssh-ed25519 {OTHER} comment\n{kept}gpu-01 ssh-ed25519 {KEY}\n"
    assert trust(old, [entry("gpu-01")], replace=True) == new
