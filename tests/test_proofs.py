"""What verify takes for a proof, and how it says that there is none."""

import json

import make
import pytest

from inferfleet.errors import TransportError
from inferfleet.project import Project
from inferfleet.verify import plugin, proofs

OWN = """\
hosts: {web: {address: "::1", port: 1, user: u, gpus: [{model: L40S}]}}
models: {m: {repository: org/m}}
deployments: {d: {engine: vllm, model: m, hosts: [web], port: 8000, api_key: !env K}}
phases: {p: {users: 1, why: w, hosts: [web], deployments: [d]}}
"""


@pytest.fixture
def project(tmp_path):
    return Project(make.write(tmp_path, own=OWN))


def answer(fingerprint):
    said = {"choices": [{"message": {"content": "a"}}], "system_fingerprint": fingerprint}
    return plugin.Answer(200, {}, [(0.1, json.dumps(said))])


@pytest.mark.parametrize(
    ("rehearse", "fingerprint", "proved"),
    [
        (False, "vllm-0.32.0", True),
        (False, None, True),
        (False, "simulator-127.0.0.1:8000", False),
        (True, "simulator-127.0.0.1:8000", True),
    ],
)
def test_a_rehearsal_proves_nothing_of_a_real_engine(project, rehearse, fingerprint, proved):
    plan = project.plan("p", rehearse=rehearse)
    (instance,) = plan.instances()
    if proved:
        assert proofs.answered(answer(fingerprint), instance, plan)
    else:
        with pytest.raises(AssertionError, match="provision without --rehearse"):
            proofs.answered(answer(fingerprint), instance, plan)


def test_a_host_that_cannot_be_reached_is_tried_once(project):
    fleet = plugin._Fleet(project, project.plan("p"), ["web"])
    with pytest.raises(TransportError) as first:
        fleet.way("web")
    with pytest.raises(TransportError) as second:
        fleet.way("web")
    assert first.value is second.value
