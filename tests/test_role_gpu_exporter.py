"""Our own GPU exporter, over nvidia-ml-py and a stand-in for the driver's library."""

import csv
import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import make
import pynvml
import pytest
import readers
from fleetkit import until
from monitoringkit import programs
from nvmlkit import FIXTURES, library  # noqa: F401 - a fixture

from inferfleet.model import endpoint


@pytest.fixture
def exported(tmp_path, library):  # noqa: F811
    """What the exporter says of a machine, by metric and GPU; `wait` for something in it."""
    program = Path(__file__).parents[1] / "roles/gpu_exporter/gpu_exporter.py"
    shutil.copy(program, tmp_path)
    shutil.copy(pynvml.__file__, tmp_path)
    with ExitStack() as stack:

        def start(machine, wait="", listen="127.0.0.1"):
            (tmp_path / "nvml.json").write_text(json.dumps(machine))
            environment = {"NVML_FIXTURE": f"{tmp_path}/nvml.json", "LD_LIBRARY_PATH": f"{library}"}
            argv = [sys.executable, "-I", "-c", RUN, str(tmp_path), listen, "0"]
            process = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            said = process.stderr.readline()
            address = re.search(r"on \S+:(\d+)$", said)
            if not address:
                return process.wait(10), said
            read = partial(scrape, f"http://{endpoint(listen, int(address[1]))}/metrics")
            return until(lambda: wait in (text := read()) and text, wait)

        yield start


RUN = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("gpu_exporter", run_name="__main__", alter_sys=True)
"""


def scrape(url):
    with urlopen(url, timeout=5) as answer:
        return answer.read().decode()


def machine(name):
    return json.loads((FIXTURES / f"{name}.json").read_text())


def test_it_tells_of_every_gpu(exported):
    h200 = machine("h200")
    h200["gpus"][1] |= {"xid": 79, "temperature": 91, "ecc_errors": 2}
    text = exported(h200, wait=" 79\n")
    one = 'gpu="1",UUID="GPU-000000a1-1111-2222-3333-444444444444",modelName="NVIDIA H200"'
    for line in (
        f"DCGM_FI_DEV_XID_ERRORS{{{one}}} 79",
        f"DCGM_FI_DEV_GPU_TEMP{{{one}}} 91",
        f"DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{one}}} 2",
        f"DCGM_FI_DEV_FB_USED{{{one}}} 625",
        f"DCGM_FI_DEV_FB_FREE{{{one}}} 143146",
    ):
        assert line in text.splitlines()
    assert text.count("DCGM_FI_DEV_XID_ERRORS{") == len(h200["gpus"])
    assert text.count(" 79\n") == 1
    tool = [str(programs() / "promtool"), "check", "metrics"]
    done = subprocess.run(tool, input=text, capture_output=True, text=True, check=False)
    assert "error" not in done.stderr + done.stdout
    assert done.returncode in (0, 3)  # 3: names that promtool would not have chosen


def test_what_a_gpu_does_not_know_is_left_out(exported):
    text = exported(machine("rtx4060"))
    assert "DCGM_FI_DEV_FB_USED{" in text
    assert "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{" not in text


def test_it_answers_on_an_ipv6_address(exported):
    assert "DCGM_FI_DEV_FB_USED{" in exported(machine("rtx4060"), listen="::1")


def test_without_a_driver_it_says_so_and_ends(exported):
    assert exported({"init": 9, "gpus": []}) == (1, "gpu_exporter: Driver Not Loaded\n")


# NVIDIA's exporter

ROLE = Path(__file__).parents[1] / "roles" / "gpu_exporter"
FLEET = """\
    hosts: {gpu-01: {address: 192.0.2.11, gpus: [{model: L40S, count: 2}]}}
    models: {}
    deployments: {}
    phases:
      p: {users: 1, why: w, hosts: [all], roles: {gpu_exporter: {hosts: [all], exporter: dcgm}}}
"""
# etc/default-counters.csv of NVIDIA/dcgm-exporter 4.8: type by field, commented ones included
KNOWN = {
    "DCGM_FI_DEV_GPU_TEMP": "gauge",
    "DCGM_FI_DEV_POWER_USAGE": "gauge",
    "DCGM_FI_DEV_GPU_UTIL": "gauge",
    "DCGM_FI_DEV_FB_FREE": "gauge",
    "DCGM_FI_DEV_FB_USED": "gauge",
    "DCGM_FI_DEV_SM_CLOCK": "gauge",
    "DCGM_FI_DEV_THERMAL_VIOLATION": "counter",
    "DCGM_FI_DEV_XID_ERRORS": "gauge",
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": "counter",
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": "gauge",
}


def test_compose_reads_what_runs_nvidias(tmp_path):
    path = tmp_path / "compose.yml"
    path.write_text(make.text(make.bundle(tmp_path, fleet=FLEET), "compose.yml"))
    argv = [*readers.compose(), "-f", path, "config", "--format", "json"]
    read = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (read.returncode, read.stderr) == (0, "")
    service = json.loads(read.stdout)["services"]["exporter"]
    assert re.fullmatch(r".*/dcgm-exporter:[\d.]+-4\.8\.\d+-distroless", service["image"])
    (mounted,) = service["volumes"]
    # the flags --address and --collectors, by the variables that stand for them
    assert service["environment"] == {
        "DCGM_EXPORTER_LISTEN": ":9400",
        "DCGM_EXPORTER_COLLECTORS": mounted["target"],
    }
    assert (mounted["source"], mounted["read_only"]) == (
        "/etc/inferfleet/gpu-exporter/counters.csv",
        True,
    )
    (port,) = service["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("192.0.2.11", "9400", 9400)
    (devices,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (devices["driver"], devices["count"]) == ("nvidia", -1), "all GPUs"


def test_nvidias_exporter_knows_its_counters_and_ours_has_the_same(exported):
    lines = (ROLE / "counters.csv").read_text().splitlines()
    rows = list(csv.reader(line for line in lines if not line.startswith("#")))
    assert all(len(row) == 3 for row in rows), "or it refuses the whole file"
    assert {field.strip(): kind.strip() for field, kind, _ in rows} == KNOWN
    ours = re.findall(r"^# TYPE (\w+) (\w+)$", exported(machine("h200")), re.MULTILINE)
    assert dict(ours) == KNOWN
