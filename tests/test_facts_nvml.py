"""GPUs as the real binding reads them, over a stand-in for the driver's library (nvml/nvml.c)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvmlkit import FIXTURES, library  # noqa: F401 - a fixture

from inferfleet.facts import Facts, collect, discover
from inferfleet.model import Host
from inferfleet.transport import Options

HERE = Host("here", "127.0.0.1", connection="local")
MIB = 1 << 20


@pytest.fixture
def seen(library, monkeypatch):  # noqa: F811
    """What this machine says it is, with the library's answers from a file or given ones."""

    def collected(answers: str | dict) -> Facts:
        path = FIXTURES / f"{answers}.json"
        if isinstance(answers, dict):
            path = library / "answers.json"
            path.write_text(json.dumps(answers))
        monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
        monkeypatch.setenv("NVML_FIXTURE", str(path))
        return collect(HERE, Options())

    return collected


@pytest.mark.parametrize(
    ("card", "count", "name", "mebibytes", "capability", "driver", "cuda"),
    [
        ("h200", 8, "NVIDIA H200", 143771, (9, 0), "580.95.05", "13.0"),
        ("a100", 4, "NVIDIA A100-SXM4-80GB", 81920, (8, 0), "550.127.08", "12.4"),
        ("l4", 2, "NVIDIA L4", 23034, (8, 9), "580.95.05", "13.0"),
        ("rtx4060", 1, "NVIDIA GeForce RTX 4060", 8188, (8, 9), "570.133.07", "12.8"),
    ],
)
def test_cards(seen, card, count, name, mebibytes, capability, driver, cuda):
    facts = seen(card)
    assert (facts.gpu_source, facts.driver, facts.cuda) == ("nvml", driver, cuda)
    assert [gpu.index for gpu in facts.gpus] == list(range(count))
    assert len({gpu.uuid for gpu in facts.gpus}) == count
    for gpu in facts.gpus:
        assert (gpu.name, gpu.capability) == (name, capability)
        assert gpu.memory_total == mebibytes * MIB == gpu.memory_free + gpu.memory_used
        assert gpu.pci.startswith("00000000:")


def test_what_a_card_lacks_is_none_and_not_wrong(seen):
    server, desktop = seen("h200").gpus[0], seen("rtx4060").gpus[0]
    assert (server.mig, server.ecc, server.ecc_errors, server.nvlinks) == (False, True, 0, 18)
    assert (desktop.mig, desktop.ecc, desktop.ecc_errors, desktop.nvlinks) == (None, None, None, 0)
    assert (server.persistence, desktop.persistence) == (True, False)


def test_mig_slices_have_names_and_memory_of_their_own(seen):
    facts = seen("mig")
    sliced, whole = facts.gpus
    assert (sliced.mig, sliced.mig_pending) == (True, False)
    assert [each.name for each in sliced.mig_instances] == ["NVIDIA H200 MIG 3g.71gb"] * 2
    assert {each.memory_total for each in sliced.mig_instances} == {71040 * MIB}
    assert len({each.uuid for each in sliced.mig_instances}) == 2
    assert (whole.mig, whole.mig_pending, whole.mig_instances) == (False, True, ())
    gpus = discover.entry(facts)["gpus"]
    assert gpus == "[{model: H200, mig: [3g.71gb, 3g.71gb]}, {model: H200}]"


def card(**more: object) -> dict:
    return {"driver": "580.1", "cuda": 13000, "gpus": [{"name": "NVIDIA L4", **more}]}


def test_processes_are_named_with_owner_age_and_memory(seen):
    sleeper = subprocess.Popen(["sleep", "100"])
    try:
        facts = seen(card(processes=[[sleeper.pid, 5 << 30], [4194304, 0]], graphics=[[1, 7]]))
    finally:
        sleeper.kill()
        sleeper.wait()
    own, gone, other = facts.gpus[0].processes
    assert (own.pid, own.memory, own.name) == (sleeper.pid, 5 << 30, "sleep")
    assert (own.command, own.parent) == ("sleep 100", os.getpid())
    assert own.user
    assert 0 <= own.age < 60
    assert (gone.pid, gone.memory, gone.name) == (4194304, None, "")
    assert (other.pid, other.memory) == (1, 7)


def test_a_gpu_that_fell_off_the_bus_still_counts(seen):
    facts = seen({"driver": "580.1", "gpus": [{"name": "A"}, {"lost": 1}, {"name": "C"}]})
    assert [gpu.name for gpu in facts.gpus] == ["A", "a GPU that does not answer", "C"]


def test_a_driver_that_is_not_loaded_says_why(seen):
    facts = seen({"init": 9})
    assert facts.gpus == ()
    assert facts.gpu_why == ("NVML does not start (Driver Not Loaded), and nvidia-smi says nothing")
    assert facts.ram_total  # and the rest is there


SMI = """#!/bin/sh
case $1 in
  --query-gpu=*compute_cap*) {newer};;
  --query-gpu=*)
    echo '0, GPU-a, NVIDIA L4, 535.104.05, 23034, 20000, 3034, 00000000:00:04.0';;
  --query-compute-apps=*) echo "GPU-a, {pid}, 2900"; echo 'GPU-b, 1, 5';;
  '') echo '| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |';;
esac
"""


@pytest.mark.parametrize(
    ("newer", "capability", "ecc"),
    [
        (
            "echo '0, GPU-a, NVIDIA L4, 535.104.05, 23034, 20000, 3034, 00000000:00:04.0, "
            "8.9, [N/A], Enabled'",
            (8, 9),
            True,
        ),
        ("exit 6", (), None),  # one that does not know the newer fields
    ],
)
def test_nvidia_smi_where_the_library_cannot_be_loaded(
    tmp_path, monkeypatch, newer, capability, ecc
):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI.format(newer=newer, pid=os.getpid()))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = collect(HERE, Options())
    assert (facts.gpu_source, facts.driver, facts.cuda) == ("nvidia-smi", "535.104.05", "12.2")
    (gpu,) = facts.gpus
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-a", "NVIDIA L4")
    assert (gpu.memory_total, gpu.memory_free) == (23034 * MIB, 20000 * MIB)
    assert (gpu.capability, gpu.mig, gpu.ecc) == (capability, None, ecc)
    (process,) = gpu.processes
    assert (process.pid, process.memory) == (os.getpid(), 2900 * MIB)
    assert process.parent == os.getppid()


def test_neither_library_nor_nvidia_smi_is_said():
    facts = collect(HERE, Options())
    if facts.gpus:
        pytest.skip("this machine has GPUs")
    assert facts.gpu_why == (
        "the driver's libnvidia-ml.so.1 is not here, and nvidia-smi says nothing"
    )


def test_the_table_shows_cards_slices_and_holders(library):  # noqa: F811
    tool = Path(sys.executable).with_name("inferfleet")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "NVML_FIXTURE": str(FIXTURES / "mig.json"),
    }
    said = subprocess.run(
        [tool, "discover", "--local"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "driver 580.95.05, CUDA 13.0 (by nvml)" in said
    assert "NVIDIA H200 MIG 3g.71gb  69.4 GiB" in said
    assert "gpus: [{model: H200, mig: [3g.71gb, 3g.71gb]}, {model: H200}]" in said
