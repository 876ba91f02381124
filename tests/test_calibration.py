"""Verify records what an engine says of its memory, and never what a rehearsal says."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import make
import pytest
import yaml

from inferfleet import calibration, outlook, verify
from inferfleet.project import Project

SIMULATOR = Path(__file__).parents[1] / "roles" / "simulator" / "simulator.py"
CONTEXT = 40_000  # tokens; sixteen of them are about what the prediction says for this GPU


def project(folder: Path, port: int) -> Project:
    """This machine as a GPU host, with a vLLM of an 8B model on it."""
    whole = {
        "hosts": {"h": {"connection": "local", "gpus": [{"model": "H200"}]}},
        "models": {"m": {"repository": "meta-llama/Llama-3.1-8B-Instruct"}},
        "deployments": {
            "d": {"engine": "vllm", "model": "m", "hosts": ["h"], "port": port,
                  "options": {"max_model_len": CONTEXT}},
        },
        "phases": {"p": {"users": 1, "why": "w", "hosts": ["h"], "deployments": ["d"]}},
    }  # fmt: skip
    return make.project(folder, fleet=yaml.safe_dump(whole, sort_keys=False))


@pytest.fixture
def port() -> Iterator[int]:
    """A stand-in for the engine, with the engine's metrics; its cache holds 16 x its context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    words = ["--port", str(number), "--served-model-name", "m", "--max-model-len", "55000"]
    with subprocess.Popen(
        [sys.executable, str(SIMULATOR), *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield number
        process.terminate()


def verified(found: Project, *, rehearse: bool) -> str:
    """What verify prints; the units are not there, so that other proofs fail."""
    plan = found.plan("p", rehearse=rehearse)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        verify.run(found, plan, plan.hosts, found.folder.parent / "junit.xml")
    return said.getvalue()


def test_a_verified_engine_corrects_the_next_prediction(tmp_path: Path, port: int) -> None:
    found = project(tmp_path, port)
    (before,) = outlook.outlooks(found.plan("p"), found.inventory)
    said = verified(found, rehearse=False)
    assert "✓ d-0: its KV cache holds a request of full context" in said
    path = found.folder / calibration.FILE
    assert f"{path}: 1 corrected; worth committing." in said
    ((key, entry),) = json.loads(path.read_text()).items()
    assert key.startswith("h/H200/m/vllm ")
    assert (entry["reported"], entry["predicted"]) == (16 * 55000, before.judgement.kv_tokens)
    again = Project(found.folder)
    (after,) = outlook.outlooks(again.plan("p"), again.inventory)
    assert abs(after.judgement.kv_tokens - 16 * 55000) <= 16
    assert "corrected" not in verified(again, rehearse=False)


def test_a_rehearsal_teaches_nothing(tmp_path: Path, port: int) -> None:
    found = project(tmp_path, port)
    verified(found, rehearse=True)
    assert not (found.folder / calibration.FILE).exists()
