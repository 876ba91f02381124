"""The lab itself: that its hosts are real where it matters, break as told, and leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import labkit
import pytest
from labkit import lab_fixture, require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet.errors import Error, HostError
from inferfleet.lab import hosts, machine, rootfs

HERE = Path(__file__).parent

lab = lab_fixture("alpha", "beta", label="labtest", binds=(labs.Bind(str(HERE), "/opt/tests"),))


@pytest.fixture
def alpha(lab: labs.Lab) -> labs.LabHost:
    return lab.hosts["alpha"]


@pytest.fixture
def beta(lab: labs.Lab) -> labs.LabHost:
    return lab.hosts["beta"]


def ssh(lab: labs.Lab, user: str, host: str, command: str, stdin: str = "") -> str:
    argv = ["ssh", "-F", str(lab.ssh_config), "-o", "BatchMode=yes", "-l", user, host, command]
    result = subprocess.run(
        argv, input=stdin, capture_output=True, text=True, timeout=20, check=False
    )
    return result.stdout.strip() or result.stderr.strip()


def said(host: labs.LabHost, command: str) -> str:
    result = host.exec(command)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def until(check, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def connects(address: str, port: int, timeout: float = 5) -> bool:
    try:
        with socket.create_connection((address, port), timeout=timeout):
            return True
    except OSError:
        return False


# A host is a host


@pytest.mark.lab
def test_systemd_is_pid_1_and_nothing_failed(alpha):
    assert said(alpha, "cat /proc/1/comm") == "systemd"
    assert said(alpha, "systemctl is-system-running") == "running"
    assert said(alpha, "hostname") == "alpha"


@pytest.mark.lab
@pytest.mark.parametrize(
    ("user", "command", "stdin", "answer"),
    [
        ("root", "id -un", "", "root"),
        ("deploy", "id -un; sudo -n id -un", "", "deploy\nroot"),
        ("asked", "sudo -n id -un", "", "sudo: a password is required"),
        ("asked", "sudo -S -p '' id -un", "lab\n", "root"),
        ("limited", "sudo -S -p '' id -un", "lab\n", "limited is not in the sudoers file."),
    ],
)
def test_users_log_in_with_the_key_and_have_the_rights_they_are_named_for(
    lab, user, command, stdin, answer
):
    assert ssh(lab, user, "beta", command, stdin) == answer


@pytest.mark.lab
def test_host_keys_are_the_hosts_own_and_known(lab, alpha, beta):
    scan = subprocess.run(
        ["ssh-keyscan", alpha.address, beta.address], capture_output=True, text=True, check=True
    ).stdout
    listed = subprocess.run(
        ["ssh-keygen", "-lf", "-"], input=scan, capture_output=True, text=True, check=True
    ).stdout
    seen = {line.split()[2]: line.split()[1] for line in listed.splitlines()}
    assert seen == {host.address: host.fingerprints[0] for host in (alpha, beta)}
    assert alpha.fingerprints != beta.fingerprints
    assert said(alpha, "cat /etc/machine-id") != said(beta, "cat /etc/machine-id")


@pytest.mark.lab
def test_hosts_reach_one_another_and_this_machine_by_name(lab, alpha):
    reach = "exec 3<>/dev/tcp/beta/22 && head -c 7 <&3"
    assert alpha.exec(["bash", "-c", reach]).stdout == "SSH-2.0"
    with socket.create_server((lab.gateway, 0)) as server:
        port = server.getsockname()[1]
        assert alpha.exec(["bash", "-c", f"exec 3<>/dev/tcp/controller/{port}"]).returncode == 0
        connection, (peer, _) = server.accept()
        connection.close()
        assert peer == alpha.address


@pytest.mark.lab
def test_root_is_the_hosts_file_system_seen_from_outside(alpha):
    (alpha.root / "srv/note").write_text("from outside")
    assert said(alpha, "cat /srv/note") == "from outside"
    said(alpha, "echo from inside > /srv/note")
    assert (alpha.root / "srv/note").read_text() == "from inside\n"


@pytest.mark.lab
def test_a_bound_folder_is_seen_and_cannot_be_written(alpha):
    assert said(alpha, "cat /opt/tests/test_lab.py") == Path(__file__).read_text().strip()
    assert "Read-only file system" in alpha.exec("touch /opt/tests/x").stderr


# What provisioning relies on


def write_unit(host: labs.LabHost, name: str, service: str) -> None:
    text = f"[Service]\n{textwrap.dedent(service)}"
    (host.root / "etc/systemd/system" / name).write_text(text)
    said(host, "systemctl daemon-reload")


@pytest.mark.lab
def test_a_killed_service_is_restarted(alpha):
    write_unit(alpha, "busy.service", "ExecStart=sleep 1000\nRestart=on-failure\nRestartSec=0\n")
    said(alpha, "systemctl start busy")
    before = said(alpha, "systemctl show --value -p MainPID busy")
    said(alpha, f"kill -9 {before}")
    until(lambda: said(alpha, "systemctl show --value -p NRestarts busy") == "1")
    until(lambda: said(alpha, "systemctl is-active busy || true") == "active")
    assert said(alpha, "systemctl show --value -p MainPID busy") not in ("0", before)


@pytest.mark.lab
def test_hardening_is_enforced(alpha):
    script = "id -un; touch /etc/x; touch /var/lib/safe/y && echo kept; unshare -n true; ls /home"
    service = f"""
        Type=oneshot
        DynamicUser=yes
        User=safe
        StateDirectory=safe
        ProtectSystem=strict
        ProtectHome=yes
        PrivateDevices=yes
        NoNewPrivileges=yes
        CapabilityBoundingSet=
        RestrictNamespaces=yes
        SystemCallFilter=@system-service
        ExecStart=sh -c '{script}'
    """
    write_unit(alpha, "safe.service", service)
    alpha.exec("systemctl start safe")
    log = said(alpha, "journalctl -b -u safe -o cat --no-pager")
    assert "safe\n" in log
    assert "kept" in log
    assert "touch: cannot touch '/etc/x': Read-only file system" in log
    assert "unshare: unshare failed: Operation not permitted" in log
    assert "ls: cannot open directory '/home': Permission denied" in log


@pytest.mark.lab
def test_the_address_filter_of_a_unit_is_enforced(alpha, beta):
    reach = f"timeout 0.3 bash -c 'exec 3<>/dev/tcp/{beta.address}/22'"
    run = "systemd-run -q --wait -p IPAddressDeny=any"
    assert alpha.exec(f"{run} -p IPAddressAllow={beta.address} {reach}").returncode == 0
    assert alpha.exec(f"{run} {reach}").returncode != 0


@pytest.mark.lab
def test_nginx_reloads_without_losing_its_master(alpha):
    def serve(answer: str) -> None:
        server = f"server {{ listen 8080; location / {{ return 200 {answer}; }} }}"
        conf = f"events {{}}\npid /run/front.pid;\nhttp {{ {server} }}\n"
        (alpha.root / "etc/nginx/front.conf").write_text(conf)

    service = """
        Type=forking
        PIDFile=/run/front.pid
        ExecStart=nginx -c /etc/nginx/front.conf
        ExecReload=nginx -c /etc/nginx/front.conf -s reload
    """
    serve("one")
    write_unit(alpha, "front.service", service)
    said(alpha, "systemctl start front")
    before = said(alpha, "systemctl show --value -p MainPID front")
    assert said(alpha, "curl -s localhost:8080") == "one"
    serve("two")
    said(alpha, "systemctl reload front")
    until(lambda: said(alpha, "curl -s localhost:8080") == "two")
    assert said(alpha, "systemctl show --value -p MainPID front") == before


# What can be broken


@pytest.mark.lab
def test_a_reboot_keeps_the_disk_and_starts_what_is_enabled(alpha):
    write_unit(alpha, "kept.service", "ExecStart=sleep 1000\n[Install]\nWantedBy=multi-user.target")
    said(alpha, "systemctl enable -q kept; touch /run/gone")
    before = said(alpha, "cat /etc/machine-id")
    alpha.reboot()
    assert said(alpha, "systemctl is-active kept") == "active"
    assert said(alpha, "cat /etc/machine-id") == before
    assert alpha.exec("test -e /run/gone").returncode == 1


@pytest.mark.lab
def test_a_power_cut_is_silent_and_keeps_what_was_written(alpha):
    with socket.create_connection((alpha.address, 22), timeout=5) as connection:
        assert connection.recv(100).startswith(b"SSH-")
        said(alpha, "echo half > /srv/half; setsid sleep 1000 </dev/null >/dev/null 2>&1 &")
        alpha.power_cut()
        assert alpha.pid is None
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):  # neither closed nor reset
            connection.recv(1)
    with pytest.raises(HostError, match="alpha: it is switched off"):
        alpha.exec("true")
    alpha.boot()
    alpha.wait_ready()
    assert said(alpha, "cat /srv/half") == "half"


@pytest.mark.lab
def test_a_partition_is_silent_until_it_heals(alpha):
    alpha.partition()
    assert not connects(alpha.address, 22, timeout=0.3)
    assert said(alpha, "systemctl is-active ssh") == "active"
    alpha.heal()
    until(lambda: connects(alpha.address, 22, timeout=1))


@pytest.mark.lab
def test_a_full_disk_refuses_to_write_and_can_be_freed(alpha):
    write = "dd if=/dev/zero of=/srv/big bs=64k count=16"
    alpha.fill_disk(leave=256 * 1024)
    assert "No space left on device" in alpha.exec(write).stderr
    assert (alpha.root / "srv/big").stat().st_size == 256 * 1024
    alpha.free_disk()
    assert alpha.exec(write).returncode == 0


@pytest.mark.lab
def test_a_stopped_host_can_be_booted_and_one_that_is_on_cannot(alpha):
    with pytest.raises(HostError, match="switched on already"):
        alpha.boot()
    alpha.stop()
    assert alpha.pid is None
    assert not alpha.cgroup.exists()
    alpha.boot()
    alpha.wait_ready()


# Several labs, other processes, what is left


def remains(name: str) -> list[str]:
    """Everything of a lab that can be found on this machine without asking the lab."""
    listings = [Path("/proc/self/mountinfo").read_text()]
    for pattern in ("/run/netns/*", f"{hosts.BASE}/*", f"{machine.cgroup_root()}/inferfleet-*"):
        listings += paths(pattern)
    listings += map(read, paths("/sys/class/net/*/ifalias"))
    listings += [read(path) for path in paths("/proc/[0-9]*/cmdline") if not is_ours(path)]
    words = (f"inferfleet/lab/{name}/", f"inferfleet-{name}")
    return [text for text in listings if any(word in f"{text}/" for word in words)]


def paths(pattern: str) -> list[str]:
    return [str(path) for path in Path("/").glob(pattern.lstrip("/"))]


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").replace("\0", " ").strip()
    except OSError:  # a process or an interface that is gone by now
        return ""


def is_ours(path: str) -> bool:
    return path.split("/")[2] in map(str, (os.getpid(), os.getppid()))


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


@pytest.fixture
def spare():
    """The name of another lab, which is not there before and not after."""
    require_lab()
    name = f"spare-{os.getpid()}"
    take_down_remains("spare")
    yield name
    labs.take_down(name)


@pytest.mark.lab
def test_another_process_can_open_a_lab_and_take_it_down(lab, spare):
    booted = labs.Lab.boot(["alpha"], name=spare, say=lambda _: None)
    assert booted.number != lab.number
    result = python(f"""
        from inferfleet.lab import Lab, running
        lab = Lab.open({spare!r})
        print(lab.hosts["alpha"].exec("hostname").stdout, end="")
        lab.down()
        print({spare!r} in running())
    """)
    assert (result.stdout, result.stderr) == ("alpha\nFalse\n", "")
    assert remains(spare) == []
    assert connects(lab.hosts["beta"].address, 22)


@pytest.mark.lab
def test_what_a_killed_process_left_half_made_is_taken_down_by_the_next_boot(spare):
    result = python(f"""
        import os, signal
        from inferfleet.lab import Lab
        Lab.wait_ready = lambda lab, timeout: os.kill(os.getpid(), signal.SIGKILL)
        Lab.boot(["alpha", "beta"], name={spare!r})
    """)
    assert result.returncode == -signal.SIGKILL
    half = labs.Lab.open(spare)
    machine.kill_cgroup(half.hosts["alpha"].cgroup)
    half.hosts["alpha"].unmake()
    assert remains(spare)
    with labs.Lab.boot(["gamma"], name=spare, say=lambda _: None) as lab:
        assert list(lab.hosts) == ["gamma"]
        assert remains(spare)
    assert remains(spare) == []


@pytest.mark.lab
def test_a_host_that_does_not_come_up_is_reported_and_nothing_is_left(spare):
    binds = [labs.Bind("/nonexistent", "/opt/nothing")]
    with pytest.raises(HostError, match=r"(?s)alpha: .*Failed to .*/nonexistent"):
        labs.Lab.boot(["alpha"], name=spare, binds=binds, timeout=0.5, say=lambda _: None)
    assert remains(spare) == []


@pytest.mark.lab
def test_the_description_says_how_to_log_in_by_hand(lab):
    first = labs.describe(lab).splitlines()[0]
    name, address, command = first.split(maxsplit=2)
    assert (name, address) == ("alpha", lab.hosts["alpha"].address)
    result = subprocess.run(
        [*command.split(), "hostname"], capture_output=True, text=True, check=True
    )
    assert result.stdout == "alpha\n"


# The parts that need no host


def test_a_lab_that_is_not_there_is_named():
    with pytest.raises(Error, match="no lab named nowhere is running"):
        labs.Lab.open("nowhere")
    assert labs.take_down("nowhere") is False
    with pytest.raises(Error, match="not a host name"):  # it would be deleted
        labs.take_down("../../../tmp")


@pytest.mark.parametrize("names", [["Alpha"], ["a/b"], ["-a"], [""], ["x" * 31], ["a", "a"]])
def test_names_that_cannot_be_host_names_are_refused(names):
    with pytest.raises(Error, match="host name"):
        hosts.check_names("lab", names)


def test_reasons_name_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reasons = labs.requirements()
    if sys.platform == "linux":
        assert "the lab needs root" in reasons
        assert any("systemd-nspawn, mmdebstrap, zstd, ip, ssh-keygen" in r for r in reasons)
        with pytest.raises(Error, match="install these packages first: systemd-container"):
            labs.install_requirements(print)
    else:
        assert reasons == ["the lab needs Linux"]


def test_a_lab_that_cannot_run_is_skipped_unless_it_was_promised(monkeypatch):
    monkeypatch.setattr(labkit, "REASONS", ["the lab needs root"])
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("INFERFLEET_REQUIRE_LAB", raising=False)
    with pytest.raises(pytest.skip.Exception, match="the lab needs root"):
        require_lab()
    monkeypatch.setenv("INFERFLEET_REQUIRE_LAB", "1")
    with pytest.raises(pytest.fail.Exception, match="the lab needs root"):
        require_lab()


DEB822 = """\
# comment
Types: deb
URIs: http://mirror.example.com/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example.com/other
Suites: bookworm
Components: stable

Types: deb-src
URIs: http://mirror.example.com/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
deb [signed-by=/k.gpg arch=amd64] http://mirror.example.com/ubuntu bookworm main universe
deb http://mirror.example.com/ubuntu bookworm-backports main
# deb http://mirror.example.com/ubuntu bookworm main
deb-src http://mirror.example.com/ubuntu bookworm main
deb http://mirror.example.com/third jammy main
"""


@pytest.mark.parametrize(
    ("file", "text", "kept"),
    [
        ("sources.list.d/debian.sources", DEB822, DEB822.split("\n\n")[0].split("\n", 1)[1] + "\n"),
        ("sources.list", ONE_LINE, ONE_LINE.splitlines()[0] + "\n"),
        ("sources.list.d/third.list", "deb http://mirror.example.com/x jammy main\n", ""),
    ],
)
def test_only_the_distributions_own_sources_are_used(tmp_path, monkeypatch, file, text, kept):
    monkeypatch.setattr(rootfs, "codename", lambda: "bookworm")
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert rootfs.sources(tmp_path) == kept


@pytest.mark.lab
def test_a_tree_cut_short_is_unpacked_again_from_the_archive(tmp_path, monkeypatch):
    require_lab()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content = tmp_path / "content"
    content.mkdir()
    (content / "etc").mkdir()
    archive = rootfs.cache() / f"{rootfs._key()}.tar.zst"
    subprocess.run(["tar", "--zstd", "-cf", archive, "-C", content, "."], check=True)
    half = rootfs.cache() / f"partial-{rootfs._key()}"
    half.mkdir()
    (half / "left-over").touch()
    said = []
    tree = rootfs.tree(said.append)
    assert [p.name for p in tree.iterdir()] == ["etc"]
    assert said == ["unpacking the hosts' root file system"]
    assert rootfs.tree(said.append) == tree
    assert len(said) == 1


@pytest.mark.lab
def test_a_failing_build_says_why_and_leaves_no_archive(tmp_path, monkeypatch):
    require_lab()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rootfs, "OPTIONS", ("--variant=nonesuch",))
    with pytest.raises(Error, match=r"(?s)mmdebstrap failed.*invalid variant"):
        rootfs.tree(lambda _: None)
    assert [p.name for p in rootfs.cache().iterdir()] == ["lock"]
