"""Our own GPU exporter, over nvidia-ml-py and a stand-in for the driver's library."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pynvml
import pytest
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
