"""Facts: what the collector answers, how it is read, and what it says to an inventory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from inferfleet.errors import ApplyError, Error
from inferfleet.facts import Facts, GpuFacts, Request, ask, collect, discover, editing, parse
from inferfleet.facts.document import Disk, MigInstance
from inferfleet.facts.onhost import collect as collecting
from inferfleet.facts.onhost import containers, machine, network, processes
from inferfleet.model import Gpu, Host
from inferfleet.transport import Options

GIB = 1 << 30
HERE = Host("here", "127.0.0.1", connection="local")


# The collector, on this machine


@pytest.fixture(scope="module")
def here() -> Facts:
    return collect(HERE, Options())


def test_this_machine_tells_what_it_is(here):
    assert here.host == "here"
    assert here.kernel == os.uname().release
    assert here.uid == os.geteuid()
    assert here.ram_total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < here.disk_of("/var/lib").free <= here.disk_of("/var/lib").total
    assert abs(here.clock_offset) < 2
    assert here.problems == ()


def test_a_listening_port_names_its_process():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = [x for x in collect(HERE, Options()).listeners if x.port == port]
    assert (found.address, found.pid) == ("127.0.0.1", os.getpid())
    assert found.parent == os.getppid()
    own = Path("/proc/self/cmdline").read_text().replace("\0", " ")
    assert found.command[:40] in own
    assert 0 <= found.age < 3600


def test_what_can_be_reached_and_what_cannot_say_why():
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        with socket.create_server(("127.0.0.1", 0)) as other:
            gone = f"127.0.0.1:{other.getsockname()[1]}"
        found = network.reach([there, gone, "nowhere.invalid:443"])["reach"]
    assert found[there] == ""
    assert found[gone] == "no connection (Connection refused)"
    assert found["nowhere.invalid:443"].startswith("its name does not resolve")


def test_what_lies_below_a_folder_counts_once(tmp_path):
    (tmp_path / "blob").write_bytes(os.urandom(1 << 20))
    (tmp_path / "link").symlink_to("blob")
    (tmp_path / "again").hardlink_to(tmp_path / "blob")
    found = machine.sizes({"model": [str(tmp_path), "/does/not/exist"]})["sizes"]["model"]
    assert 1 << 20 <= found < (1 << 20) + 65536


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: {}["MemTotal"])
    answer = collecting.collect({})
    assert answer["problems"] == ["memory: KeyError: 'MemTotal'"]
    assert "ram_total" not in answer
    assert answer["kernel"]


def test_the_collector_is_for_python_3_8():
    import ast

    for source in Path(processes.__file__).parent.glob("*.py"):
        ast.parse(source.read_text(), feature_version=(3, 8))
        imported = {
            (each.module or "") if isinstance(each, ast.ImportFrom) else each.names[0].name
            for each in ast.walk(ast.parse(source.read_text()))
            if isinstance(each, ast.Import | ast.ImportFrom)
        }
        own = {name for name in imported if name.startswith("inferfleet.facts.onhost")}
        top = {name.partition(".")[0] for name in imported - own}
        assert top - {"pynvml"} <= sys.stdlib_module_names


def test_a_host_without_python_says_so(tmp_path, monkeypatch):
    for name in ("sh", "dd"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ApplyError, match=r"^here: it has no python3"):
        collect(HERE, Options())


def test_a_host_that_says_something_else_is_named(tmp_path, monkeypatch):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\necho hello; echo broken >&2; exit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ApplyError, match=r"^here: it did not tell its facts: broken$"):
        collect(HERE, Options())


# Pieces of it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("0100007F:1F90", ("127.0.0.1", 8080)),
        ("00000000:01BB", ("0.0.0.0", 443)),
        ("00000000000000000000000000000000:0016", ("::", 22)),
        ("0000000000000000FFFF0000020200C0:1F40", ("192.0.2.2", 8000)),
        ("B80D0120000000000000000001000000:1F40", ("2001:db8::1", 8000)),
    ],
)
def test_addresses_of_proc_net_tcp(words, said):
    assert network.endpoint(words) == said


ID = "4f" * 32


@pytest.mark.parametrize(
    ("cgroup", "said"),
    [
        ("0::/system.slice/inferfleet-coder-0.service\n", ("inferfleet-coder-0.service", "")),
        ("0::/user.slice/user-1000.slice/session-2.scope\n", ("", "")),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/tmux.scope\n", ("", "")),
        (f"0::/system.slice/docker-{ID}.scope\n", ("", ID)),
        (f"12:devices:/docker/{ID}\n1:name=systemd:/docker/{ID}\n", ("", ID)),
        (f"0::/machine.slice/libpod-{ID}.scope/container\n", ("", ID)),
        ("1:name=systemd:/system.slice/ollama.service\n0::/\n", ("ollama.service", "")),
    ],
)
def test_units_and_containers_of_a_cgroup(cgroup, said):
    assert processes.place(cgroup) == said


@pytest.mark.parametrize(
    ("config", "gpu"),
    [
        ({"DeviceRequests": [{"Driver": "nvidia", "Capabilities": [["gpu"]]}]}, "hook"),
        ({"DeviceRequests": [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]}, "hook"),
        ({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}]}, "cdi"),
        ({"DeviceRequests": None, "Runtime": "nvidia"}, "runtime"),
        ({"DeviceRequests": None, "Runtime": "runc"}, ""),
    ],
)
def test_how_a_container_got_its_gpus(config, gpu, tmp_path, monkeypatch):
    """As `docker inspect` tells it, by a docker that says what a real one did."""
    inspected = [
        {
            "Id": ID,
            "Name": "/coder",
            "Config": {"Image": "vllm:1", "Labels": {"com.docker.compose.project": "web"}},
            "HostConfig": config,
            "NetworkSettings": {
                "Ports": {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "9000"}], "53/udp": None}
            },
        }
    ]
    info = {"ServerVersion": "28.3.0", "CgroupDriver": "systemd", "CgroupVersion": "2"}
    script = f"""#!/bin/sh
case $1 in
  info) echo '{json.dumps(info)}';;
  ps) echo {ID};;
  inspect) echo '{json.dumps(inspected)}';;
  --version) echo 'Docker version 28.3.0, build 1234567';;
  *) exit 1;;
esac
"""
    (tmp_path / "docker").write_text(script)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setitem(processes.ENVIRONMENT, "PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = parse({"host": "h", **containers.containers()}).containers
    assert (found.docker, found.docker_client, found.cgroup_driver) == ("28.3.0",) * 2 + (
        "systemd",
    )
    (one,) = found.running
    assert (one.name, one.project, one.gpu) == ("coder", "web", gpu)
    assert one.ports == (("0.0.0.0", 9000),)


# Reading


def test_unknown_keys_pass_and_nested_things_are_built():
    data = {
        "host": "h",
        "new": 1,
        "disks": [{"mount": "/", "total": 4, "later": True}],
        "gpus": [{"index": 0, "capability": [9, 0], "mig_instances": [{"name": "1g"}]}],
    }
    facts = parse(data)
    assert facts.disks == (Disk("/", total=4),)
    assert facts.gpus == (GpuFacts(0, capability=(9, 0), mig_instances=(MigInstance("1g"),)),)


def test_the_disk_of_a_path_is_the_nearest_above():
    facts = Facts("h", disks=(Disk("/"), Disk("/var"), Disk("/var/lib"), Disk("/va")))
    assert facts.disk_of("/var/cache/x").mount == "/var"
    assert facts.disk_of("/var/lib").mount == "/var/lib"
    assert facts.disk_of("/varnish").mount == "/"


def test_the_program_is_small_and_asks_once():
    assert len(ask.program()) < 80_000
    assert ask.program() is ask.program()
    assert Request() == Request((), {})


# The inventory entry

H200 = GpuFacts(0, "NVIDIA H200", memory_total=143771 << 20)
FACTS = Facts(
    "gpu-01",
    ram_total=2015 * GIB + 5,
    disks=(Disk("/", total=100 * GIB), Disk("/var", total=3500 * GIB + 7)),
    gpus=(H200, H200),
)


def test_an_entry_says_what_there_is():
    expected = {"gpus": "[{model: H200, count: 2}]", "ram_gib": "2015", "disk_gib": "3500"}
    assert discover.entry(FACTS) == expected


def test_an_entry_counts_slices_in_place_of_their_gpu():
    slices = (MigInstance("NVIDIA H200 MIG 3g.71gb"),) * 2
    facts = Facts("h", gpus=(GpuFacts(0, "NVIDIA H200", mig=True, mig_instances=slices), H200))
    entry = yaml.safe_load(discover.entry(facts)["gpus"])
    assert entry == [{"model": "H200", "mig": ["3g.71gb", "3g.71gb"]}, {"model": "H200"}]


def test_only_what_differs_is_written():
    gpus = (Gpu(0, "H200 141GB"), Gpu(1, "H200 141GB"))
    host = Host("gpu-01", "192.0.2.1", gpus=gpus, ram_gib=2015, disk_gib=100)
    assert discover.differing(host, FACTS) == {"disk_gib": "3500"}
    wrong = Host("gpu-01", "192.0.2.1", gpus=(Gpu(0, "H100"), Gpu(1, "H100")))
    assert discover.differing(wrong, FACTS).keys() == {"gpus", "ram_gib", "disk_gib"}


HOSTS = """\
# yaml-language-server: $schema=schema.json
groups: {all: {user: deploy}}   # ours

hosts:
  gpu-01:
    address: 192.0.2.11   # rack 4
    gpus:                 # two, for now
      - {model: L40S}
      # the second one came later
      - model: L40S
    ram_gib: 512          # as ordered

    # not before spring
    groups: [gpu-servers]
  gpu-02: {address: 192.0.2.12, ram_gib: 64}   # small
  gpu-03:
    address: 192.0.2.13


  gpu-04:
    address: "192.0.2.14"
    gpus: &four [{model: L40S, count: 4}]
    ram_gib:
  gpu-05: {address: 192.0.2.15, gpus: *four, }
  gpu-06:
    address: 192.0.2.16
    gpus: *four   # as the other
    variables: {vllm: {environment: {A: !env B}}}
# the end
"""
VALUES = {"gpus": "[{model: H200, count: 8}]", "ram_gib": "2015", "disk_gib": "3500"}


@pytest.mark.parametrize(
    ("host", "old", "new"),
    [
        (
            "gpu-01",
            """\
    gpus:                 # two, for now
      - {model: L40S}
      # the second one came later
      - model: L40S
    ram_gib: 512          # as ordered

    # not before spring
    groups: [gpu-servers]
""",
            """\
    gpus:                 [{model: H200, count: 8}]
    ram_gib: 2015          # as ordered

    # not before spring
    groups: [gpu-servers]
    disk_gib: 3500
""",
        ),
        (
            "gpu-02",
            "{address: 192.0.2.12, ram_gib: 64}   # small",
            "{address: 192.0.2.12, ram_gib: 2015, gpus: [{model: H200, count: 8}], "
            "disk_gib: 3500}   # small",
        ),
        (
            "gpu-03",
            "    address: 192.0.2.13\n",
            "    address: 192.0.2.13\n    gpus: [{model: H200, count: 8}]\n"
            "    ram_gib: 2015\n    disk_gib: 3500\n",
        ),
        (
            "gpu-06",
            "    gpus: *four   # as the other\n    variables: {vllm: {environment: {A: !env B}}}\n",
            "    gpus: [{model: H200, count: 8}]   # as the other\n"
            "    variables: {vllm: {environment: {A: !env B}}}\n"
            "    ram_gib: 2015\n    disk_gib: 3500\n",
        ),
        (
            "gpu-05",
            "{address: 192.0.2.15, gpus: *four, }",
            "{address: 192.0.2.15, gpus: [{model: H200, count: 8}], ram_gib: 2015, "
            "disk_gib: 3500 }",
        ),
    ],
)
def test_an_edit_changes_the_entry_and_nothing_else(host, old, new):
    assert HOSTS.count(old) == 1
    assert editing.updated(HOSTS, host, VALUES) == HOSTS.replace(old, new)


def test_an_empty_value_is_filled():
    after = editing.updated(HOSTS, "gpu-04", {"ram_gib": "64"})
    assert after == HOSTS.replace("    ram_gib:\n", "    ram_gib: 64\n")


def test_an_edit_that_would_change_more_is_refused():
    with pytest.raises(Error, match="paste it by hand"):
        editing.updated(HOSTS, "gpu-04", {"gpus": "[{model: H200}]"})  # the anchor goes with it


@pytest.mark.parametrize("ending", ["", "\n"])
def test_the_last_line_of_a_file(ending):
    text = "hosts:\n  a:\n    address: 192.0.2.1" + ending
    assert editing.updated(text, "a", {"ram_gib": "8"}) == (
        "hosts:\n  a:\n    address: 192.0.2.1\n    ram_gib: 8" + ending
    )


def test_the_file_that_defines_a_host_is_found(tmp_path):
    (tmp_path / "a.yml").write_text("models: {}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/hosts.yml").write_text(HOSTS)
    assert editing.defining(tmp_path, "gpu-03") == tmp_path / "sub/hosts.yml"
    with pytest.raises(Error, match="no file defines the host 'gpu-99'"):
        editing.defining(tmp_path, "gpu-99")


# The task


def run(*words: str, code: int = 0) -> str:
    tool = Path(sys.executable).with_name("inferfleet")
    done = subprocess.run(
        [tool, "discover", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_discover_local_needs_no_inventory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = json.loads(run("--local", "--json"))
    assert document["ok"]
    assert document["hosts"]["local"]["entry"]["ram_gib"] == str(
        document["hosts"]["local"]["ram_total"] >> 30
    )
    assert "as an inventory entry" in run("--local")


def test_write_updates_the_inventory_and_then_has_nothing_to_do(tmp_path):
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    text = "hosts:\n  here:\n    connection: local   # this one\n"
    (inventory / "hosts.yml").write_text(text)
    assert "here: ram_gib: " in run("--host", "here", "--write", "--inventory", str(inventory))
    after = (inventory / "hosts.yml").read_text()
    assert after.startswith(text)
    assert yaml.safe_load(after)["hosts"]["here"].keys() == {"connection", "ram_gib", "disk_gib"}
    said = run("--host", "here", "--write", "--inventory", str(inventory))
    assert "right as it is" in said
    assert (inventory / "hosts.yml").read_text() == after


def test_wrong_usage_is_exit_code_2(tmp_path):
    (tmp_path / "hosts.yml").write_text("hosts:\n  here: {connection: local}\n")
    assert "did you mean here" in run("--host", "her", "--inventory", str(tmp_path), code=2)
    run("--local", "--write", code=2)
