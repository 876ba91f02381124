"""Driver, toolkit and fabric manager come by apt from a signed repository to a host with systemd.

The packages bear the names of NVIDIA's and hold stand-ins for its programs, which answer as those
do; a driver works from the boot after its installation on. The tests go on from each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import make
import pytest
import yaml
from aptkit import Signer, deb, publish, served
from fleetkit import TOOL, said
from labkit import require_lab, take_down_remains

from inferfleet import lab as labs

pytestmark = pytest.mark.lab
LABEL = "nvidia"
OLD, NEWER, NEXT = "580.82.07", "580.95.05", "590.44.01"

SMI = """\
#!/bin/sh
if [ ! -e /run/nvidia/version ]; then
  echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
  exit 9
elif [ "$(cat /run/nvidia/version)" != VERSION ]; then
  echo "Failed to initialize NVML: Driver/library version mismatch"
  exit 18
fi
case "$*" in
  -L) for n in 0 1; do echo "GPU $n: NVIDIA H200 (UUID: GPU-0000000$n-1111-2222)"; done;;
  --query-gpu=driver_version*-i*) echo VERSION;;
  --query-gpu=driver_version*) echo VERSION; echo VERSION;;
esac
"""
MODULE = """\
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'mkdir -p /run/nvidia && cp /usr/share/nvidia/version /run/nvidia/version'
"""
CTK = """\
#!/bin/sh
case "$1 $2" in
  'cdi generate')
    nvidia-smi -L >/run/cdi/listed || exit 1
    { echo 'cdiVersion: "0.5.0"'; echo 'kind: nvidia.com/gpu'; echo 'devices:'
      sed -n 's/^GPU \\([0-9]*\\):.*/  - name: "\\1"/p' /run/cdi/listed; } >"${3#--output=}";;
  'cdi list')
    echo "Found CDI devices" >&2
    sed -n 's/.*name: "\\(.*\\)"/nvidia.com\\/gpu=\\1/p' /var/run/cdi/nvidia.yaml;;
esac
"""
FABRIC = "#!/bin/sh\necho 'Fabric Manager version is : VERSION'\n"
FABRIC_UNIT = """\
[Service]
ExecStart=/bin/sh -c '[ "$(cat /run/nvidia/version)" = VERSION ] && exec sleep infinity'
[Install]
WantedBy=multi-user.target
"""
SYSTEM = "lib/systemd/system"


def driver(folder: Path, version: str) -> None:
    """A driver's packages as Ubuntu has them, by branch, and the fabric manager beside it."""
    branch, exact = version.partition(".")[0], f"{version}-0ubuntu1"
    utils, libraries = f"nvidia-utils-{branch}-server", f"libnvidia-compute-{branch}-server"
    depends = f"{libraries} (= {exact})"
    headless = f"nvidia-headless-{branch}-server-open"
    deb(folder, headless, exact, {}, Depends=depends, **alone("nvidia-headless"))
    programs = {
        "usr/bin/nvidia-smi": SMI.replace("VERSION", version),
        "usr/share/nvidia/version": f"{version}\n",
        f"{SYSTEM}/nvidia-module.service": MODULE,
        f"{SYSTEM}/sysinit.target.d/nvidia.conf": "[Unit]\nWants=nvidia-module.service\n",
    }
    deb(folder, utils, exact, programs, Depends=depends, **alone("nvidia-utils"))
    library = {"usr/lib/libnvidia-ml.so.1": version}
    deb(folder, libraries, exact, library, **alone("libnvidia-compute"))
    fabric(folder, version)


def fabric(folder: Path, version: str) -> None:
    branch = version.partition(".")[0]
    files = {
        "usr/bin/nv-fabricmanager": FABRIC.replace("VERSION", version),
        f"{SYSTEM}/nvidia-fabricmanager.service": FABRIC_UNIT.replace("VERSION", version),
    }
    name = f"nvidia-fabricmanager-{branch}"
    deb(folder, name, f"{version}-0ubuntu1", files, **alone("nvidia-fabricmanager"))


def alone(what: str) -> dict[str, str]:
    """Of the branches of one package, a host has one."""
    return {"Provides": what, "Conflicts": what, "Replaces": what}


def toolkit(folder: Path) -> None:
    depends = "nvidia-container-toolkit-base (= 1.18.0-1)"
    deb(folder, "nvidia-container-toolkit", "1.18.0-1", {}, Depends=depends)
    deb(folder, "nvidia-container-toolkit-base", "1.18.0-1", {"usr/bin/nvidia-ctk": CTK})


@dataclass(frozen=True)
class Server:
    """The host, the project, and the repository that its packages come from."""

    lab: labs.Lab
    folder: Path
    packages: Path
    url: str
    signer: Signer

    @property
    def host(self) -> labs.LabHost:
        return self.lab.hosts["gpu-01"]

    def write(self, *, minimum: str, branch: str, key: str = "") -> None:
        """The inventory: which driver is wanted, and whose packages are trusted."""
        host = self.host
        named = (f"nvidia-headless-{branch}-server-open", f"nvidia-utils-{branch}-server")
        libraries = f"libnvidia-compute-{branch}-server"  # unnamed, apt would rather keep the old
        reached = {"address": host.address, "user": "deploy", "become": "sudo"}
        login = {"key": str(self.lab.ssh_key), "host_keys": list(host.fingerprints)}
        source = {"url": f"{self.url}/$(ARCH)", "suite": "/", "key": key or self.signer.key}
        wanted = {"minimum": minimum, "packages": [*named, libraries]}
        role = {"hosts": ["all"], "driver": wanted, "repository": source}
        phase = {"users": 1, "why": "w", "hosts": ["all"], "roles": {"nvidia": role}}
        gpus = [{"model": "H200", "count": 2}]
        fleet = {
            "hosts": {"gpu-01": {**reached, **login, "gpus": gpus}},
            "models": {},
            "deployments": {},
            "phases": {"p": phase},
        }
        make.write(self.folder, fleet=yaml.safe_dump(fleet, sort_keys=False))

    def run(self, *words: str) -> Any:
        inventory = self.folder / "inventory"
        argv = [TOOL, *words, "--json", "--inventory", inventory, "--phase", "p"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout)

    def provision(self) -> tuple[str, str]:
        """How it ended, and the error if it failed."""
        host = self.run("provision", "--yes", "--skip-doctor")["hosts"]["gpu-01"]
        return host["status"], host["error"] or ""

    def installed(self, *patterns: str) -> dict[str, str]:
        """Versions of installed packages by name."""
        form = "${db:Status-Status} ${Package} ${Version}\\n"
        shown = self.host.exec(["dpkg-query", "-W", "-f", form, *patterns]).stdout
        lines = [line.split() for line in shown.splitlines()]
        return {line[1]: line[2] for line in lines if line[0] == "installed"}

    def held(self) -> set[str]:
        return set(said(self.host, "apt-mark showhold").split())

    def reboot(self) -> None:
        self.host.reboot()
        switches(self.host)


def switches(host: labs.LabHost) -> None:
    """NVSwitches, as the driver shows them once it is loaded."""
    said(host, "mkdir -p /run/proc/nvidia-nvswitch/devices/0000:07:00.0")
    said(host, "mount --bind /run/proc /proc/driver")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    require_lab()
    take_down_remains(LABEL)
    folder = tmp_path_factory.mktemp("gpus")
    with ExitStack() as stack:
        keys = stack.enter_context(tempfile.TemporaryDirectory())  # GnuPG needs a short path
        signer = Signer.make(Path(keys, "gnupg"))
        stack.callback(signer.close)
        lab = stack.enter_context(labs.Lab.boot(["gpu-01"], name=f"{LABEL}-{os.getpid()}"))
        host = lab.hosts["gpu-01"]
        machine = said(host, "rm -rf /etc/apt/sources.list* && dpkg --print-architecture")
        packages = folder / "served" / machine
        packages.mkdir(parents=True)
        driver(packages, OLD)
        fabric(packages, NEWER)  # newer than the driver: not to be taken
        toolkit(packages)
        publish(packages, signer)
        switches(host)
        url = stack.enter_context(served(folder / "served", lab.gateway)).url
        made = Server(lab, folder, packages, url, signer)
        made.write(minimum="580", branch="580")
        yield made


def test_packages_that_another_signed_are_not_installed(server: Server, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as keys:
        other = Signer.make(Path(keys, "gnupg"))
        server.write(minimum="580", branch="580", key=other.key)
        other.close()
    status, error = server.provision()
    assert status == "failed"
    assert "is not signed" in error
    assert server.installed("*nvidia*") == {}
    server.write(minimum="580", branch="580")


def test_a_driver_that_was_installed_asks_for_a_reboot(server: Server) -> None:
    for _ in range(2):
        status, error = server.provision()
        assert status == "failed"
        assert "the driver is installed: reboot, then provision again" in error
        assert set(server.installed("*nvidia*").values()) == {f"{OLD}-0ubuntu1"}
        assert server.held() == set(server.installed("*nvidia*"))


def test_after_it_all_the_rest_is_there(server: Server) -> None:
    server.reboot()
    assert server.provision() == ("changed", "")
    assert yaml.safe_load(said(server.host, "cat /var/run/cdi/nvidia.yaml"))["devices"] == [
        {"name": "0"},
        {"name": "1"},
    ]
    assert said(
        server.host, "systemctl is-active inferfleet-gpus nvidia-fabricmanager"
    ).split() == [
        "active",
        "active",
    ]
    assert server.installed("nvidia-fabricmanager*") == {
        "nvidia-fabricmanager-580": f"{OLD}-0ubuntu1"
    }
    assert server.held() == set(server.installed("*nvidia*")) - {
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
    }


def test_nothing_is_left_to_do_and_the_roles_proofs_hold(server: Server) -> None:
    assert server.provision() == ("unchanged", "")
    proofs = server.run("verify")["proofs"]
    assert len(proofs) == 5
    assert [proof for proof in proofs if not proof["passed"]] == []


def test_names_are_there_again_after_a_boot(server: Server) -> None:
    server.reboot()
    assert said(server.host, "nvidia-ctk cdi list").split() == [
        "nvidia.com/gpu=0",
        "nvidia.com/gpu=1",
    ]
    assert server.provision() == ("unchanged", "")


def test_an_upgrade_of_the_host_leaves_the_driver(server: Server) -> None:
    driver(server.packages, NEWER)
    driver(server.packages, NEXT)
    publish(server.packages, server.signer)
    said(server.host, "apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qqy upgrade")
    assert set(server.installed("*nvidia-utils*").values()) == {f"{OLD}-0ubuntu1"}
    assert server.provision() == ("unchanged", "")


def test_another_branch_replaces_what_was_held(server: Server) -> None:
    server.write(minimum="590", branch="590")
    status, error = server.provision()
    assert status == "failed"
    assert "reboot, then provision again" in error
    assert set(server.installed("nvidia-utils*", "libnvidia*").values()) == {f"{NEXT}-0ubuntu1"}
    server.reboot()
    assert server.provision() == ("changed", "")
    assert server.installed("nvidia-fabricmanager*") == {
        "nvidia-fabricmanager-590": f"{NEXT}-0ubuntu1"
    }
    assert {"nvidia-utils-590-server", "nvidia-fabricmanager-590"} <= server.held()
    assert server.provision() == ("unchanged", "")
