"""Ollama on a real host: unit, model and the proof of its GPUs, with a stand-in for its program.

The stand-in says by STANDIN_GPU_SHARE how much of a model it holds in GPU memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make
import pytest
from fleetkit import said
from labkit import require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet import push
from inferfleet.errors import ApplyError
from inferfleet.model import Diff, Result

pytestmark = pytest.mark.lab

LABEL = "ollama"
UNIT = "inferfleet-chat-0.service"
STAND_IN = Path(__file__).parent / "tools" / "ollama"
GATE = "var/lib/ollama/gate"

INVENTORY = """\
hosts:
  gpu: {{address: {address}, user: deploy, become: sudo, key: {key}, host_keys: ['{fingerprint}'],
        gpus: [{{model: L4}}]}}
models: {{coder: {{repository: "{tag}", served_name: coder}}}}
deployments:
  chat:
    engine: ollama
    model: coder
    hosts: [gpu]
    port: 11434
    options:
      environment: {{STANDIN_GPU_SHARE: '{share}', STANDIN_GATE: {gate}}}
      modelfile: {{system: '{system}'}}
phases: {{p: {{users: 1, why: w, hosts: [gpu], deployments: [chat]}}}}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[labs.Lab]:
    require_lab()
    take_down_remains(LABEL)
    with labs.Lab.boot(["gpu"], name=f"{LABEL}-{os.getpid()}") as booted:
        local = booted.hosts["gpu"].root / "usr/local/bin"
        for name in ("curl", "zstd"):  # what only the download needs, which is done already
            (local / name).write_text("#!/bin/sh\n")
            (local / name).chmod(0o755)
        (local / "ollama").write_bytes(STAND_IN.read_bytes())
        (local / "ollama").chmod(0o755)
        yield booted


def provision(
    lab: labs.Lab,
    folder: Path,
    share: str,
    system: str = "x",
    tag: str = "coder:7b",
    on_event: push.OnEvent = lambda *_: None,
) -> tuple[Diff, Result]:
    host = lab.hosts["gpu"]
    text = INVENTORY.format(
        address=host.address,
        key=lab.ssh_key,
        fingerprint=host.fingerprints[0],
        share=share,
        system=system,
        tag=tag,
        gate=f"/{GATE}",
    )
    project = make.project(folder, fleet=text)
    plan = project.plan("p")
    (bundle,) = project.bundles(plan, plan.hosts, project.secrets)
    surveyed = push.survey(bundle, project.options())
    try:
        return surveyed.diff, push.apply(surveyed, "provision p", on_event)
    finally:
        surveyed.close()


def test_a_model_on_the_cpu_fails_until_it_is_on_the_gpus(lab: labs.Lab, tmp_path: Path) -> None:
    host = lab.hosts["gpu"]
    with pytest.raises(ApplyError, match=r"(?s)sits on its GPUs.*runs on the CPU: 0\.0 of 5\.0"):
        provision(lab, tmp_path, share="0")
    _, result = provision(lab, tmp_path, share="1")
    assert result.status == "changed"
    assert said(host, f"systemctl show -p User --value {UNIT}").strip() == "ollama"
    diff, _ = provision(lab, tmp_path, share="1")
    assert not diff, diff.changes

    host.exec(f"systemctl restart {UNIT}")
    said(host, "until python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 11434))'"
         " 2>/dev/null; do sleep 0.1; done")  # fmt: skip
    diff, _ = provision(lab, tmp_path, share="1")
    # the stand-in forgets its models; a restart alone leaves nothing to prove
    assert {change.subject for change in diff.changes} == {"model coder is there as wanted"}

    diff, _ = provision(lab, tmp_path, share="1", system="y")
    assert "/etc/inferfleet/chat-0/model.json" in {change.subject for change in diff.changes}
    url = "http://127.0.0.1:11434/made"
    asked = f"import urllib.request as r; print(r.urlopen('{url}').read().decode())"
    made = json.loads(said(host, f'python3 -c "{asked}"'))
    assert made["coder:latest"]["system"] == "y"


def test_a_pull_shows_its_percentage_while_it_runs(lab: labs.Lab, tmp_path: Path) -> None:
    """The stand-in stops in the middle until the percentage has arrived here."""
    gate, told = lab.hosts["gpu"].root / GATE, []

    def on_event(_: str, event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "output" and "50 %" in event["line"]:
            gate.touch()

    _, result = provision(lab, tmp_path, share="1", tag="held:7b", on_event=on_event)
    assert result.status == "changed"
    title = "model coder is there as wanted"
    wanted = {"event": "output", "title": title, "line": "pulling 1a2b: 50 % of 5.0 GiB"}
    ended = {"event": "ensure", "title": title, "state": "ok"}
    assert told.index(wanted) < told.index(ended)
