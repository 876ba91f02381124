"""The model cache on real hosts: a writer, a reader that stages, engines that wait for the whole.

What stands in: mount.nfs, which binds a folder both hosts see, as no NFS client is in a container's
kernel, and the engine, which takes any folder with a weights file in it, whole or not.
"""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fleetkit import TOOL, said, until
from labkit import require_lab, take_down_remains
from make import write

from inferfleet import lab as labs
from inferfleet import push
from inferfleet.errors import HostError
from inferfleet.model import Result
from inferfleet.modelpath import FETCH_UNIT, escaped
from inferfleet.project import Project

pytestmark = pytest.mark.lab

LABEL = "modelcache"
ROLES = Path(__file__).parents[1] / "roles"
FIRST, SECOND = (
    "8e8ed243bbe6f9a5aff549a0924562fc719b2b8a",
    "1ed0a6145da0ce550c628e8e8b678f51e695995d",
)
ENGINE = "inferfleet-coder-0.service"
STAGED = "/var/lib/llm-models"
MODELS = "/mnt/llm-models"

MOUNT = """\
#!/bin/sh
echo "$4" >>/run/mounts
[ ! -e /srv/nas/away ] || exit 32
mount --bind /srv/nas/llm "$2"
case $4 in ro,*) mount -o remount,bind,ro "$2" ;; esac
"""

VLLM = """\
#!/bin/sh
model=$2
[ -e "$model/model.safetensors" ] || { echo "no weights in $model" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --host) host=$2 ;;
    --port) port=$2 ;;
    --served-model-name) name=$2 ;;
  esac
  shift
done
exec -a "vllm $model" /usr/bin/python3 /opt/stand-in/simulator.py --host $host --port $port \\
  --served-model-name $name --token-rate 200
"""

INVENTORY = """\
hosts:
%s
models:
  coder: {repository: org/coder, revision: %s}
deployments:
  coder:
    engine: vllm
    model: coder
    hosts: [all]
    port: 8000
    gpus_per_instance: 0
    options: {runtime: native, venv: /opt/stand-in, startup_timeout: 20}
phases:
  p:
    users: 1
    why: w
    hosts: [all]
    deployments: [coder]
    roles:
      model_cache:
        hosts: [all]
        writer: alpha
        share: nas.example.com:/llm
        path: /mnt/llm-models
        directory: /srv/disk
        reserve_gib: 0
        timeout: 10
"""


@dataclass
class Cache:
    """Alpha writes and serves from the share; beta reads, and serves from its own disk."""

    lab: labs.Lab
    folder: Path
    nas: Path

    @property
    def alpha(self) -> labs.LabHost:
        return self.lab.hosts["alpha"]

    @property
    def beta(self) -> labs.LabHost:
        return self.lab.hosts["beta"]

    def carry(self, revision: str) -> Path:
        """A disk with the model, put into alpha."""
        folder = self.alpha.root / f"srv/disk/coder@{revision}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(os.urandom(1 << 16))
        program = ROLES / "model_cache/models.py"
        (self.alpha.root / "root/models.py").write_bytes(program.read_bytes())
        inside = f"/srv/disk/coder@{revision}"
        said(self.alpha, f"python3 /root/models.py seal {inside} coder {revision}")
        return folder

    def project(self, revision: str) -> Project:
        hosts = [
            f"  {h.name}: {{address: {h.address}, user: deploy, become: sudo, "
            f"key: {self.lab.ssh_key}, host_keys: ['{h.fingerprints[0]}']{more}}}"
            for h, more in (
                (self.alpha, ""),
                (self.beta, f", variables: {{model_cache: {{staging: {STAGED}}}}}"),
            )
        ]
        return Project(write(self.folder, fleet=INVENTORY % ("\n".join(hosts), revision)))

    def provision(
        self, revision: str, *names: str, on_event: push.OnEvent = lambda *_: None
    ) -> dict[str, Any]:
        project = self.project(revision)
        plan = project.plan("p")
        hosts = project.chosen(plan, ",".join(names))
        bundles = project.bundles(plan, hosts, project.secrets)

        def apply(bundle: Any) -> Result:
            surveyed = push.survey(bundle, project.options())
            try:
                return push.apply(surveyed, "provision p", on_event)
            finally:
                surveyed.close()

        return {b.host.name: outcome for b, outcome in push.each(bundles, apply)}


def state(host: labs.LabHost, unit: str = ENGINE) -> str:
    return host.exec(f"systemctl is-active {unit}").stdout.strip()


def log(host: labs.LabHost, unit: str) -> str:
    return said(host, f"journalctl -b -u {unit} -o cat --no-pager")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cache]:
    require_lab()
    take_down_remains(LABEL)
    nas = tmp_path_factory.mktemp("nas")
    (nas / "llm").mkdir()
    for folder in (nas, nas / "llm"):
        folder.chmod(0o777)  # the writer's user may write there, as on a real server
    binds = (
        labs.Bind(str(nas), "/srv/nas", read_only=False),
        labs.Bind("/dev/autofs", "/dev/autofs"),
    )
    if not Path("/dev/autofs").exists():
        pytest.skip("no /dev/autofs here")
    name = f"{LABEL}-{os.getpid()}"
    with labs.Lab.boot(["alpha", "beta"], name=name, disk="1G", binds=binds) as lab:
        for host in lab.hosts.values():
            put(host, "usr/sbin/mount.nfs", MOUNT)
            put(host, "opt/stand-in/bin/vllm", VLLM.replace("/bin/sh", "/bin/bash"))
            source = (ROLES / "simulator/simulator.py").read_text()
            # here it stands for vLLM itself; verify knows the simulator by its fingerprint
            put(host, "opt/stand-in/simulator.py", source.replace('f"simulator-', 'f"vllm-'))
        yield Cache(lab, tmp_path_factory.mktemp("project"), nas)


def put(host: labs.LabHost, path: str, text: str) -> None:
    target = host.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(textwrap.dedent(text))
    target.chmod(0o755)


@pytest.fixture(scope="module")
def half(cache: Cache) -> dict[str, Any]:
    """What provisioning says while the disk was carried in too early, half copied."""
    weights = cache.carry(FIRST) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    outcomes = cache.provision(FIRST, "alpha")
    weights.write_bytes(whole)
    return outcomes


@pytest.fixture(scope="module")
def provisioned(half: dict[str, Any], cache: Cache) -> Cache:
    for outcome in cache.provision(FIRST).values():
        assert isinstance(outcome, Result), outcome
    return cache


def test_half_a_model_stops_provisioning_before_any_engine_starts(half, cache):
    assert isinstance(half["alpha"], HostError)
    assert "model.safetensors has 32768 of 65536 bytes" in str(half["alpha"])
    assert state(cache.alpha) == "inactive"
    assert list((cache.nas / "llm").glob("coder*")) == []


def test_writer_and_reader_provisioned_at_once_serve_the_whole_model(provisioned):
    for host, folder in ((provisioned.alpha, MODELS), (provisioned.beta, STAGED)):
        assert state(host) == "active"
        assert f"{folder}/coder@{FIRST}" in log(host, ENGINE) + said(host, "ps -eo args")
    owner = said(provisioned.alpha, f"stat -c %U {MODELS}/coder@{FIRST}/config.json")
    assert owner == "inferfleet-models"
    mounts = [said(host, "sort -u /run/mounts") for host in provisioned.lab.hosts.values()]
    assert [options.split(",")[0] for options in mounts] == ["rw", "ro"]
    refused = provisioned.beta.exec(f"touch {MODELS}/x")
    assert "Read-only file system" in refused.stderr


def test_a_second_run_finds_nothing_to_do(provisioned):
    outcomes = provisioned.provision(FIRST)
    assert {outcome.status for outcome in outcomes.values()} == {"unchanged"}


def test_it_is_proven(provisioned):
    inventory = str(provisioned.project(FIRST).folder)
    report = str(provisioned.folder / "report.xml")
    done = subprocess.run(
        [
            *(TOOL, "verify", "--inventory", inventory, "--phase", "p", "--limit", "beta"),
            *("--junit", report, "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    proved = {proof["proves"] for proof in json.loads(done.stdout)["proofs"]}
    assert "every model its engines read is complete, by its manifest" in proved


def test_an_engine_refuses_half_a_model_which_it_would_take_unguarded(provisioned):
    host = provisioned.beta
    weights = host.root / STAGED.lstrip("/") / f"coder@{FIRST}/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    drop = host.root / f"etc/systemd/system/{ENGINE}.d/test.conf"
    drop.parent.mkdir()
    try:
        # without a wait, and without the unit that would make it whole again
        idle = host.root / "etc/systemd/system/inferfleet-staging.service.d/test.conf"
        idle.parent.mkdir()
        idle.write_text("[Unit]\nConditionPathExists=/nonexistent\n")
        unit = (host.root / "etc/systemd/system" / ENGINE).read_text().replace("\\\n", "")
        (check,) = [x for x in unit.splitlines() if x.startswith("ExecStartPre=")]
        drop.write_text(f"[Service]\nExecStartPre=\n{check.replace('--wait 60', '--wait 0')}\n")
        said(host, "systemctl daemon-reload")
        assert host.exec(f"systemctl restart {ENGINE}").returncode == 1
        assert "model.safetensors has 1000 of 65536 bytes" in log(host, ENGINE)
        drop.write_text("[Service]\nExecStartPre=\n")
        said(host, f"systemctl daemon-reload; systemctl restart {ENGINE}")
        assert state(host) == "active", "unguarded, it serves whatever is there"
    finally:
        for made in (drop, idle):
            made.unlink()
            made.parent.rmdir()
        said(host, f"systemctl daemon-reload; systemctl restart {ENGINE}")
    assert weights.stat().st_size == len(whole), "what was not whole was staged again"


def test_a_server_that_is_away_at_boot_delays_engines_and_nothing_else(provisioned):
    """Were the mount required by the engine, it would stay down when the server is back."""
    host, away = provisioned.alpha, provisioned.nas / "away"
    away.touch()
    try:
        host.stop()
        host.boot()
        until(lambda: host.pid is not None, "it is switched on")
        until(lambda: state(host, "ssh") == "active", "people can log in")
        until(lambda: state(host) == "activating", "the engine is waiting")
        # more failures at once than systemd allows a unit that has not said otherwise
        assert host.exec(f"for i in $(seq 8); do ls {MODELS}; done").returncode == 2
        assert state(host, f"'{escaped(MODELS)}.automount'") == "active"
        restarts = f"systemctl show -p NRestarts --value {ENGINE}"
        assert said(host, restarts) == "0", "it waits, and does not use up its starts"
    finally:
        away.unlink()
    until(lambda: state(host) == "active", "the engine starts by itself")
    host.wait_ready()


HOLD = """\
[Service]
ExecStartPre=/bin/sh -c 'until [ -e /srv/nas/go ]; do echo held; sleep 0.1; done'
"""


def test_what_is_fetched_is_shown_live(provisioned):
    """Fetching waits until its journal's line has arrived here."""
    provisioned.carry(SECOND)
    hold = f"etc/systemd/system/{FETCH_UNIT}.d/hold.conf"
    put(provisioned.alpha, hold, HOLD)
    said(provisioned.alpha, f"chmod 644 /{hold} && systemctl daemon-reload")

    def on_event(host: str, event: dict[str, Any]) -> None:
        if (host, event["event"], event.get("line")) == ("alpha", "output", "held"):
            (provisioned.nas / "go").touch()

    for outcome in provisioned.provision(SECOND, on_event=on_event).values():
        assert isinstance(outcome, Result), outcome
    assert (provisioned.nas / "go").exists()


def test_what_no_deployment_uses_is_removed_from_staging_when_nobody_reads_it(provisioned):
    cache = provisioned
    for outcome in cache.provision(SECOND).values():
        assert isinstance(outcome, Result), outcome
    staged = cache.beta.root / STAGED.lstrip("/")
    assert f"coder@{FIRST}: no deployment uses it, but a process still does; kept" in log(
        cache.beta, "inferfleet-staging.service"
    )
    assert f"{STAGED}/coder@{SECOND}" in said(cache.beta, "ps -eo args")
    said(cache.beta, "systemctl start inferfleet-staging.service")
    assert [path.name for path in staged.iterdir()] == [f"coder@{SECOND}"]
    kept = sorted(path.name for path in (cache.nas / "llm").iterdir())
    assert kept == sorted(f"coder@{revision}" for revision in (FIRST, SECOND))
