"""Every file of the example fleet, with real keys, read by the program that will read it."""

import json
import subprocess

import pytest
import readers

from inferfleet.lab.fleet import Made, make, names
from inferfleet.project import Project

PHASES = ("local", "pilot", "production")
UNITS = "etc/systemd/system"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """The example with hosts, keys and a certificate made up: its secrets can be resolved."""
    folder = tmp_path_factory.mktemp("fleet") / "project"
    key = folder.parent / "key"
    hosts = [Made(n, f"192.0.2.{i}", 22, "root", "none", ()) for i, n in enumerate(names(5), 1)]
    return Project(make(folder, hosts, key))


@pytest.fixture(scope="module")
def trees(fleet, tmp_path_factory):
    """Every host of every phase, real and rehearsed: a root folder each, as it would be pushed."""
    found = {}
    for phase in PHASES:
        for rehearse in (False, True):
            plan = fleet.plan(phase, rehearse=rehearse)
            for bundle in fleet.bundles(plan, plan.hosts, fleet.secrets):
                root = tmp_path_factory.mktemp("root")
                _lay_out(bundle, root)
                found[phase, rehearse, bundle.host.name] = root
    return found


def _lay_out(bundle, root):
    for artefact in bundle.artefacts:
        path = root / artefact.path[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(artefact.content)
        path.chmod(artefact.mode)


def files(trees, name):
    found = [path for root in trees.values() for path in sorted(root.rglob(name))]
    assert found
    return found


def test_nginx_takes_every_balancer_without_a_warning(trees):
    for configuration in files(trees, "nginx.conf"):
        assert readers.nginx(configuration) == "", configuration


def test_nginx_refuses_a_certificate_of_another_key(trees, tmp_path):
    """The reader reads the keys, too."""
    source = files(trees, "nginx.conf")[0].parent
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    certificate = (tmp_path / "tls.crt").read_text()
    (tmp_path / "tls.key").write_text(certificate)
    assert "tls.key" in readers.nginx(tmp_path / "nginx.conf")


STUBS = ("usr/bin/python3", "usr/bin/docker", "usr/sbin/nginx", "usr/local/bin/ollama", "bin/kill")
TARGETS = ("network-online.target", "multi-user.target", "docker.service", "sysinit.target")


def verify(root):
    """What systemd objects to in a root's units; their programs and neighbours are stubs."""
    units = sorted((root / UNITS).glob("inferfleet-*.service"))
    programs = [*STUBS, *(_program(unit) for unit in units)]
    for program in programs:
        stub = root / program
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.touch()
        stub.chmod(0o755)
    for name in TARGETS:
        own = "[Service]\nExecStart=/usr/bin/docker\n" if name.endswith("service") else ""
        (root / UNITS / name).write_text(f"[Unit]\nDescription=stub\n{own}")
    checked = subprocess.run(
        [readers.program("systemd-analyze"), "verify", "--man=no", f"--root={root}"]
        + [unit.name for unit in units],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return checked.stderr


def _program(unit):
    service = readers.unit(unit.read_text())["Service"]
    return readers.words(dict(service)["ExecStart"])[0].lstrip("/")


def test_systemd_takes_every_unit_without_a_word(trees):
    for key, root in trees.items():
        if (root / UNITS).is_dir():
            assert verify(root) == "", key


@pytest.mark.parametrize(
    "wrong",
    [
        "Restrt=always",
        "ExecReload=/not/there",
        "TimeoutStopSec=soon",
        "User=%",
        "ProtectHome=maybe",
    ],
)
def test_systemd_would_have_complained(tmp_path, wrong):
    (tmp_path / UNITS).mkdir(parents=True)
    text = f"[Service]\nExecStart=/usr/bin/docker\n{wrong}\n"
    (tmp_path / UNITS / "inferfleet-x.service").write_text(text)
    assert verify(tmp_path)


def test_every_unit_is_hardened_and_ends_its_whole_group(trees):
    for unit in files(trees, "inferfleet-*.service"):
        sections = readers.unit(unit.read_text())
        service = dict(sections["Service"])
        assert service["NoNewPrivileges"] == "yes", unit
        assert service["KillMode"] in ("control-group", "mixed"), unit
        assert dict(sections["Install"])["WantedBy"] == "multi-user.target"
        if "docker" not in service["ExecStart"]:
            assert service["ProtectSystem"] == "strict", unit


def test_compose_takes_every_service_and_gives_it_its_gpus(trees):
    seen = set()
    for file in files(trees, "compose.yml"):
        if (content := (file.read_text(), (file.parent / "engine.env").read_text())) in seen:
            continue  # the same on every server
        seen.add(content)
        read = subprocess.run(
            [*readers.compose(), "-f", file, "config", "--format", "json"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (read.returncode, read.stderr) == (0, ""), file
        service = json.loads(read.stdout)["services"]["engine"]
        (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
        index = int(file.parent.name.rpartition("-")[2])
        assert devices["device_ids"] == [str(2 * index), str(2 * index + 1)]
        assert devices["capabilities"] == ["gpu"]
        assert len(service["environment"]["VLLM_API_KEY"]) == 48
        (port,) = service["ports"]
        assert (port["target"], port["published"]) == (8000, str(8000 + index))
        assert port["host_ip"].startswith("192.0.2.")
    assert len(seen) > 1


def test_environment_files_hold_the_keys_and_nothing_else(trees):
    engines = set()
    for file in files(trees, "engine.env"):
        assert file.stat().st_mode & 0o777 == 0o600
        variables = readers.environment_file(file.read_text())
        engines.add((file.parent.name, *variables))
        assert all(len(value) == 48 for value in variables.values())
    assert engines == {
        ("coder-local-0",),  # the simulator in Ollama's place, which knows no keys
        ("coder-pilot-0", "VLLM_API_KEY"),
        ("coder-0", "VLLM_API_KEY"),
        ("coder-1", "VLLM_API_KEY"),
    }
