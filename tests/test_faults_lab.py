"""What goes wrong on real hosts: one clear line, the others finish, nothing stays half done."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import pytest
from fleetkit import MEMORY, Fleet, Watch, held, leftovers, said, tree, units, until, wait_unlocked

from inferfleet import whoami
from inferfleet.errors import HostError
from inferfleet.lab import LabHost
from inferfleet.model import Result

pytestmark = pytest.mark.lab

CODER = ["inferfleet-coder-0.service", "inferfleet-coder-1.service"]


@pytest.fixture
def production(booted_fleet) -> Fleet:
    booted_fleet.settle()
    return booted_fleet


def change_all(fleet: Fleet) -> None:
    """Something to do for every host: two restarts on a server, a reload on the balancer."""
    for name in ("gpu-01", "gpu-02"):
        fleet.set_host(name, variables={"simulator": {"token_rate": 80}})
    fleet.set_host("lb-01", variables={"balancer": {"read_timeout": 500}})


def shrink_all(fleet: Fleet) -> None:
    """The same, and each server loses one of its two instances."""
    change_all(fleet)
    fleet.edit("deployments.yml", "instances_per_host: 2", "instances_per_host: 1")


def assert_activated(fleet: Fleet, workers: str) -> None:
    """What runs is what the files say now: no restart, and no reload, is still owed."""
    for name in ("gpu-01", "gpu-02"):
        running = said(fleet.hosts[name], "pgrep -fa ^/usr/bin/python3").splitlines()
        assert len(running) == len(units(fleet.hosts[name]))
        assert all("--token-rate 80" in line for line in running)
    assert said(fleet.hosts["lb-01"], WORKERS) != workers


# nginx's processes but for those that only let their last streams end
WORKERS = "pgrep -f 'nginx: worker process$' | tr '\\n' ' '"


# One host fails

Trouble = Callable[[Fleet, LabHost], AbstractContextManager[None]]


@contextmanager
def powered_off(_: Fleet, host: LabHost) -> Iterator[None]:
    host.power_cut()
    yield
    host.boot()
    host.wait_ready()


@contextmanager
def wrong_key(fleet: Fleet, host: LabHost) -> Iterator[None]:
    path = fleet.folder / "stranger"
    subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", path], check=True)
    fleet.set_host(host.name, key=str(path))
    yield
    fleet.set_host(host.name, key=str(fleet.lab.ssh_key))


@contextmanager
def changed_host_key(_: Fleet, host: LabHost) -> Iterator[None]:
    key = "/etc/ssh/ssh_host_ed25519_key"
    said(host, f"mv {key} /root/kept && ssh-keygen -qt ed25519 -N '' -f {key}")
    said(host, "systemctl restart ssh")
    yield
    said(host, f"mv /root/kept {key} && systemctl restart ssh")


@contextmanager
def full_disk(_: Fleet, host: LabHost) -> Iterator[None]:
    host.fill_disk()
    yield
    host.free_disk()


@contextmanager
def no_python(_: Fleet, host: LabHost) -> Iterator[None]:
    python = host.root / "usr/bin/python3"
    moved = python.rename(python.with_name("moved"))
    yield
    moved.rename(python)


@contextmanager
def no_sudo_right(fleet: Fleet, host: LabHost) -> Iterator[None]:
    fleet.set_host(host.name, user="limited")
    yield
    fleet.set_host(host.name, user="deploy")


@contextmanager
def nginx_folder_gone(_: Fleet, host: LabHost) -> Iterator[None]:
    said(host, "mv /var/lib/nginx /root/kept")
    yield
    said(host, "mv /root/kept /var/lib/nginx")


@pytest.mark.parametrize(
    ("victim", "trouble", "says"),
    [
        ("gpu-02", powered_off, "port 22"),
        ("gpu-02", wrong_key, "stranger"),
        (
            "gpu-02",
            changed_host_key,
            "its host key is not one of the inventory's host_keys: it showed SHA256:",
        ),
        ("gpu-02", full_disk, "No space left on device"),
        ("gpu-02", no_python, "it has no python3; install it"),
        ("gpu-01", no_sudo_right, "sudo asks for limited's password: set become_password"),
        ("lb-01", nginx_folder_gone, "nginx.conf is not valid, says /usr/sbin/nginx"),
    ],
)
def test_a_host_that_fails_says_why_and_stays_as_it_was(
    production, victim: str, trouble: Trouble, says: str
):
    change_all(production)
    host, before = production.hosts[victim], production.trees()
    running = units(host)
    with trouble(production, host):
        ran = production.run("provision", "--yes", code=1)
        assert tree(host) == before.pop(victim)
        assert leftovers(host) == []
        if trouble is not powered_off:
            assert units(host) == running
    assert ran.line(victim).split()[1] == "failed"
    assert says in ran.line(victim)
    for name, old in before.items():
        assert ran.line(name).split()[1] == "changed"
        assert tree(production.hosts[name]) != old
    statuses = {name: outcome.status for name, outcome in production.push().items()}
    assert statuses == {**dict.fromkeys(before, "unchanged"), victim: "changed"}


def test_a_host_that_another_run_holds_names_it(production):
    change_all(production)
    lb = production.hosts["lb-01"]
    with held({lb: "systemctl reload-or-restart"}) as wait:
        first = production.start("provision", "--yes", "--limit", "lb-01")
        wait(lambda: first.poll() is not None)
        production.set_host("lb-01", variables={"balancer": {"read_timeout": 400}})
        ran = production.run("provision", "--yes", code=1)
    assert f"locked by {whoami.owner()} since 2" in ran.line("lb-01")
    assert "(provision production)" in ran.line("lb-01")
    assert {ran.line(name).split()[1] for name in ("gpu-01", "gpu-02")} == {"changed"}
    assert "changed" in production.ended(first).line("lb-01")
    production.run("provision", "--yes")
    production.assert_clean()


# A run is cut short

Change = Callable[[Fleet], None]
CHECKING = {
    "gpu-01": "systemd-analyze verify",
    "gpu-02": "systemctl daemon-reload",
    "lb-01": "systemctl reload-or-restart",
}
SWAPPING = {
    "gpu-01": "systemctl restart",
    "gpu-02": "systemctl disable",
    "lb-01": "systemctl cat",
}
CUTS = pytest.mark.parametrize(
    ("change", "moments"), [(change_all, CHECKING), (shrink_all, SWAPPING)]
)


@contextmanager
def run_held(fleet: Fleet, moments: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A run that stands still on each host, at a moment of its own."""
    with held({fleet.hosts[name]: moment for name, moment in moments.items()}) as wait:
        process = fleet.start("provision", "--yes")
        try:
            wait(lambda: process.poll() is not None)
            yield process
        finally:
            process.kill()
            print(*process.communicate())


def assert_next_run_completes(fleet: Fleet, workers: str) -> None:
    fleet.run("provision", "--yes")
    fleet.assert_clean()
    assert_activated(fleet, workers)


@CUTS
def test_the_client_is_killed(production, change: Change, moments):
    change(production)
    workers = said(production.hosts["lb-01"], WORKERS)
    with run_held(production, moments) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_unlocked(production.hosts.values())
    assert_next_run_completes(production, workers)


def test_the_client_is_killed_while_it_asks(production):
    change_all(production)
    before = production.trees(), production.units()
    asked = production.hosts["gpu-01"]
    process = production.start("provision", "--yes")
    until(lambda: asked.exec("pgrep -f '^sh -c umask 077'").stdout, "it asks", 10)
    process.send_signal(signal.SIGSTOP)
    process.kill()
    process.communicate()
    wait_unlocked(production.hosts.values())
    workers = "" if (production.trees(), production.units()) == before else "changed already"
    assert_next_run_completes(production, workers)


@CUTS
def test_the_applier_is_killed(production, change: Change, moments):
    change(production)
    workers = said(production.hosts["lb-01"], WORKERS)
    with run_held(production, moments) as process:
        for host in production.hosts.values():
            holder = json.loads((host.root / MEMORY / "lock").read_text())
            said(host, f"kill -9 {holder['pid']}")
        ran = production.ended(process, code=1)
    for name in production.hosts:
        assert "; the next run finishes or undoes it" in ran.line(name)
    planned = production.run("plan").out
    assert planned.count("! an interrupted run  (is finished or undone first)") == 1
    assert_next_run_completes(production, workers)


@CUTS
def test_the_power_fails(production, change: Change, moments):
    change(production)
    workers = said(production.hosts["lb-01"], WORKERS)
    with run_held(production, moments), ThreadPoolExecutor() as pool:
        list(pool.map(LabHost.power_cut, production.hosts.values()))
    for host in production.hosts.values():
        host.boot()
    production.lab.wait_ready()
    assert_next_run_completes(production, workers)


def test_the_network_fails(production):
    change_all(production)
    workers = said(production.hosts["lb-01"], WORKERS)
    hosts = production.hosts.values()
    with held({production.hosts[n]: m for n, m in CHECKING.items()}) as wait:
        with ThreadPoolExecutor() as pool:
            pushed = pool.submit(production.push, keepalive=0.3)
            wait(pushed.done)
            for host in hosts:
                host.partition()
            outcomes = pushed.result(30)
        for host in hosts:
            host.heal()
    for name, outcome in outcomes.items():
        assert isinstance(outcome, HostError)
        assert str(outcome).startswith(f"{name}: connection lost")
    wait_unlocked(hosts)
    assert_next_run_completes(production, workers)


# Restarts are owed


def test_a_restart_that_failed_is_paid_by_the_next_run(production):
    host = production.hosts["gpu-02"]
    trouble = host.root / "etc/systemd/system" / f"{CODER[0]}.d/trouble.conf"
    trouble.parent.mkdir()
    trouble.write_text("[Service]\nExecStartPre=/usr/bin/test -e /etc/allowed\n")
    try:
        change_all(production)
        ran = production.run("provision", "--yes", code=1)
        assert f"restart of {CODER[0]} failed" in ran.line("gpu-02")
        assert {ran.line(name).split()[1] for name in ("gpu-01", "lb-01")} == {"changed"}
        planned = production.run("plan", "--json").json["hosts"]["gpu-02"]["changes"]
        assert {c["kind"] for c in planned} == {"pay", "ensure"}
        assert [c["subject"] for c in planned if c["kind"] == "pay"] == CODER
        (host.root / "etc/allowed").touch()
        outcome = production.push()["gpu-02"]
        assert isinstance(outcome, Result)
        assert outcome.restarts == 2
        assert_activated(production, "")
    finally:
        trouble.unlink()
        trouble.parent.rmdir()
        said(host, "systemctl daemon-reload")
    production.assert_clean()


# Secrets


def test_no_secret_is_seen_anywhere(booted_fleet):
    fleet = booted_fleet
    fleet.restore()
    fleet.wipe()
    fleet.run("render")
    fleet.run("plan")  # all contents are new, and shown
    with Watch() as watch:
        fleet.run("provision", "--yes")
    fleet.run("provision", "--yes", "--json")
    assert any(b"python3\0-I\0-S" in line for line in watch.seen)
    found = [s for s in fleet.secrets if any(s.encode() in line for line in watch.seen)]
    for host in fleet.hosts.values():
        journal = said(host, "journalctl -o export --no-pager")
        found += [secret for secret in fleet.secrets if secret in journal]
        found += readable_by_others(host, fleet.secrets)
    rendered = [p.read_text() for p in (fleet.folder / "build").rglob("*") if p.is_file()]
    assert rendered
    found += [secret for secret in fleet.secrets if any(secret in text for text in rendered)]
    assert found == []


def readable_by_others(host: LabHost, secrets: list[str]) -> list[str]:
    """Files that hold a secret and that not only their owner may read."""
    grep = "grep -rlF -D skip -f /dev/stdin /run /tmp /dev/shm 2>/dev/null"
    volatile = host.exec(grep, stdin="\n".join(secrets)).stdout.split()
    found = [path for path in volatile if said(host, f"stat -c %a {path}")[-2:] != "00"]
    holders = 0
    for folder, _, names in os.walk(host.folder / "disk/upper"):
        for path in (os.path.join(folder, name) for name in names):  # noqa: PTH118 - thousands
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode) and holds(path, secrets):
                holders += 1
                found += [path] if info.st_mode & 0o077 else []
    assert holders
    return found


def holds(path: str, secrets: list[str]) -> bool:
    with open(path, "rb") as file:  # noqa: PTH123
        content = file.read()
    return any(secret.encode() in content for secret in secrets)
