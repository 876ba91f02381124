"""GPU metrics of all the host's GPUs are there for Prometheus."""

import re

from testinfra.host import Host

from inferfleet.model import Step, endpoint
from inferfleet.verify.proofs import Ask, steady

UNIT = "inferfleet-gpu-exporter.service"


def test_runs_and_starts_at_boot(host: Host, step: Step) -> None:
    """the unit runs and starts at boot"""
    steady(host, UNIT)


def test_tells_of_every_gpu(ask: Ask, step: Step) -> None:
    """it tells the memory, the temperature and the last Xid of every GPU of the inventory"""
    answer = ask(f"http://{endpoint(step.host.private_address, step.settings['port'])}/metrics")
    assert answer.status == 200, answer.error or answer.text[:500]
    for name in ("FB_USED", "GPU_TEMP", "XID_ERRORS"):
        found = re.findall(rf'^DCGM_FI_DEV_{name}{{.*?gpu="(\d+)"', answer.text, re.MULTILINE)
        assert len(set(found)) == len(step.host.gpus), f"{name} is there for {found}"
