"""Docker's files by contents and real reader; its guarded commands against stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path

import make
import pytest
from readers import missing

from inferfleet.errors import InventoryError
from inferfleet.model import Artefact, Bundle, Ensure
from inferfleet.project import Project

FLEET = """\
hosts:
  gpu-01: {address: 192.0.2.11, gpus: [{model: L40S}]}
models: {}
deployments: {}
phases:
  p:
    users: 1
    why: w
    hosts: [all]
    roles:
      docker:
        hosts: [all]
%s
"""
KEY = "-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmQINBF\n-----END PGP PUBLIC KEY BLOCK-----\n"
REPOSITORY = f"""\
repository:
  url: https://mirror.example.com/docker
  suite: bookworm
  key: |
{textwrap.indent(KEY, "    ")}"""
EVERYTHING = """\
registry_mirrors: ["https://mirror.example.com"]
insecure_registries: ["registry.example.com:5000"]
log_size: 10m
log_files: 3
cgroup_driver: systemd
data_root: /srv/docker
daemon: {max-concurrent-downloads: 2}
nvidia: {hosts: [all]}
"""


def project(folder: Path, settings: str = "") -> Project:
    docker, _, others = settings.partition("nvidia:")
    text = textwrap.indent(docker, " " * 8)
    text += f"\n      nvidia:{others}" if others else ""
    return make.project(folder, fleet=FLEET % text)


def bundle(folder: Path, settings: str = "") -> Bundle:
    made = project(folder, settings)
    plan = made.plan("p")
    (found,) = made.bundles(plan, plan.hosts)
    return found


def daemon(found: Bundle) -> Artefact:
    (config,) = [a for a in found.artefacts if a.path == "/etc/docker/daemon.json"]
    return config


def ensure(found: Bundle, words: str) -> Ensure:
    (wanted,) = [e for e in found.ensures if words in e.title]
    return wanted


def test_daemon_json_says_what_is_wanted_and_no_more(tmp_path: Path) -> None:
    assert json.loads(daemon(bundle(tmp_path)).content) == {
        "live-restore": True,
        "log-driver": "json-file",
        "log-opts": {"max-file": "5", "max-size": "50m"},
    }


def test_every_setting_reaches_daemon_json(tmp_path: Path) -> None:
    said = json.loads(daemon(bundle(tmp_path, EVERYTHING)).content)
    assert said == {
        "data-root": "/srv/docker",
        "exec-opts": ["native.cgroupdriver=systemd"],
        "features": {"cdi": True},
        "insecure-registries": ["registry.example.com:5000"],
        "live-restore": True,
        "log-driver": "json-file",
        "log-opts": {"max-file": "3", "max-size": "10m"},
        "max-concurrent-downloads": 2,
        "registry-mirrors": ["https://mirror.example.com"],
        "runtimes": {"nvidia": {"args": [], "path": "nvidia-container-runtime"}},
    }


@pytest.fixture(scope="module")
def dockerd() -> str:
    """Docker's daemon, newer than the distribution's, which cannot validate yet."""
    script = Path(__file__).parent / "tools" / "dockerd"
    fetched = subprocess.run([script], capture_output=True, text=True, timeout=300)
    if fetched.returncode:
        missing(f"no dockerd: {fetched.stderr.strip()[-300:]}")
    return fetched.stdout.strip()


def validated(dockerd: str, config: Artefact, folder: Path) -> subprocess.CompletedProcess[str]:
    staged = folder / "daemon.json"
    staged.write_bytes(config.content)
    argv = [word.replace("{path}", str(staged)) for word in config.validate]
    path = f"{Path(dockerd).parent}:{os.environ['PATH']}"
    return subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "PATH": path})


@pytest.mark.parametrize("settings", ["", EVERYTHING])
def test_dockerd_accepts_it(dockerd: str, tmp_path: Path, settings: str) -> None:
    done = validated(dockerd, daemon(bundle(tmp_path, settings)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "configuration OK" in done.stdout + done.stderr


def test_dockerd_refuses_a_key_that_it_does_not_know(dockerd: str, tmp_path: Path) -> None:
    config = daemon(bundle(tmp_path, "daemon: {regstry-mirrors: []}"))
    done = validated(dockerd, config, tmp_path)
    assert done.returncode != 0
    assert "regstry-mirrors" in done.stderr


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder in place of /, whose docker says what `state` holds."""
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin/docker").write_text(f'#!/bin/sh\ncat {root}/state\n[ "$2" != nothing ]\n')
    (root / "bin/docker").chmod(0o755)
    (root / "state").write_text("")
    return root


def run(host: Path, script: str) -> subprocess.CompletedProcess[str]:
    for path in ("/etc/", "/var/lib/"):
        script = script.replace(path, f"{host}{path}")
    environment = {**os.environ, "PATH": f"{host}/bin:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("state", "ours"),
    [("", True), ("false 0", True), ("true 3", True), ("false 3", False), ("false 10", False)],
)
def test_docker_is_not_restarted_under_running_containers(
    host: Path, tmp_path: Path, state: str, ours: bool
) -> None:
    (host / "state").write_text(state)
    wanted = ensure(bundle(tmp_path), "ours to write")
    assert (run(host, wanted.test).returncode == 0) is ours
    assert "live-restore is off" in run(host, wanted.run).stderr


def test_a_daemon_json_of_others_is_not_overwritten(host: Path, tmp_path: Path) -> None:
    found = bundle(tmp_path)
    wanted, config = ensure(found, "ours to write"), host / "etc/docker/daemon.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"debug": true}\n')
    assert run(host, wanted.test).returncode != 0
    assert "was written by others" in run(host, wanted.run).stderr

    config.write_bytes(daemon(found).content)
    assert run(host, wanted.test).returncode == 0, "what is the same may be adopted"

    config.write_text("changed since")
    manifest = host / "var/lib/inferfleet/current.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"files": {f"{host}/etc/docker/daemon.json": {}}}))
    assert run(host, wanted.test).returncode == 0, "ours is ours, whoever changed it"


def test_docker_is_first_started_with_what_is_wanted(host: Path, tmp_path: Path) -> None:
    found = bundle(tmp_path)
    config, (first, *_) = host / "etc/docker/daemon.json", found.ensures
    (host / "var/lib/inferfleet").mkdir(parents=True)
    test = first.test.replace("dockerd", "dockerd-of-a-fresh-host")  # this machine may have one
    assert run(host, test).returncode != 0
    assert run(host, first.run).returncode == 0
    assert config.read_bytes() == daemon(found).content
    assert config.stat().st_mode & 0o777 == 0o644
    assert run(host, test).returncode == 0

    other = bundle(tmp_path / "other", "log_files: 2")
    wanted = ensure(other, "ours to write")
    assert run(host, wanted.test).returncode == 0, "a push that ended there leaves it ours"
    config.write_text("changed since")
    assert run(host, wanted.test).returncode != 0


def test_the_command_line_is_asked_for_where_it_may_be_apart(tmp_path: Path) -> None:
    wanted = ensure(bundle(tmp_path), "package docker-cli")
    assert wanted.test == "command -v docker >/dev/null"
    others = bundle(tmp_path / "others", REPOSITORY).ensures
    assert not [each for each in others if "docker-cli" in each.title]


def test_a_repository_is_there_before_packages(host: Path, tmp_path: Path) -> None:
    (host / "bin/apt-get").write_text(f'#!/bin/sh\necho "$*" >>{host}/asked\n')
    (host / "bin/apt-get").chmod(0o755)
    found = bundle(tmp_path, REPOSITORY)
    source = ensure(found, "come from https://mirror.example.com/docker")
    titles = [e.title for e in found.ensures if e.before]
    assert titles.index(source.title) < titles.index("Docker Engine is installed")
    # on a real host the test compares the very files; here their places differ
    done = run(host, source.run)
    assert done.returncode == 0, done.stderr
    assert (host / "asked").read_text() == "update\n"
    written = (host / "etc/apt/sources.list.d/inferfleet-docker.sources").read_text()
    assert written == textwrap.dedent(f"""\
        Types: deb
        URIs: https://mirror.example.com/docker
        Suites: bookworm
        Components: stable
        Signed-By: {host}/etc/apt/keyrings/inferfleet-docker.asc
        """)
    assert (host / "etc/apt/keyrings/inferfleet-docker.asc").read_text() == KEY
    assert (
        "docker-ce docker-ce-cli containerd.io docker-compose-plugin"
        in ensure(found, "Engine is installed").run
    )


def test_the_distributions_packages_without_a_repository(tmp_path: Path) -> None:
    assert "docker.io" in ensure(bundle(tmp_path), "Engine is installed").run


def test_proxies_are_kept_from_the_eyes_of_others(tmp_path: Path) -> None:
    found = bundle(tmp_path, "proxy: {https: !env PROXY, except: [127.0.0.1, .example.com]}")
    files = {a.path: a for a in found.artefacts}
    proxy = files["/etc/inferfleet/docker/proxy.env"]
    assert proxy.secret
    assert proxy.mode == 0o600
    text = proxy.content.decode()
    assert 'HTTPS_PROXY="<secret env:PROXY>"' in text
    assert 'NO_PROXY="127.0.0.1,.example.com"' in text
    dropin = files["/etc/systemd/system/docker.service.d/50-inferfleet.conf"]
    assert b"EnvironmentFile=/etc/inferfleet/docker/proxy.env\n" in dropin.content
    assert dropin.restarts == ("docker.service",)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("repository: {url: https://mirror.example.com}", "public key"),
        ("cgroup_driver: systemd\ndaemon: {exec-opts: []}", "leave one of them out"),
        ("log_size: huge", "log_size"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: str, said: str) -> None:
    with pytest.raises(InventoryError, match=said):
        _ = project(tmp_path, settings).inventory


def test_a_rehearsal_leaves_docker_alone(tmp_path: Path) -> None:
    assert project(tmp_path).plan("p", rehearse=True).steps["gpu-01"] == ()
