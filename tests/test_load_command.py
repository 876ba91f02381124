"""The command bench, as a whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import loadkit
import pytest
from invoke.context import Context
from invoke.exceptions import Exit
from loadkit import Simulator

from inferfleet.cli import namespace
from inferfleet.load import compare

ROOT = Path(__file__).parent.parent

running, simulator = loadkit.running, loadkit.simulator

# the command

COMMAND = [sys.executable, "-W", "error", "-m", "inferfleet"]


def run(folder, *words, command=COMMAND, **environment):
    return subprocess.run(
        [*command, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


URL = "http://127.0.0.1:1"
SHORT = ("--output-tokens", "8", "--prompt-tokens", "64", "--ignore-eos")


def test_the_whole_command(simulator, tmp_path):
    words = ("--url", simulator.url, *SHORT, "--concurrency", "1,2", "--requests", "4")
    done = run(tmp_path, "bench", *words, "--html", "r.html", "--svg", "r.svg")
    assert done.returncode == 0, done
    assert "1, 2 requests at once, 4 requests each" in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "4", "0"], ["2", "4", "0"]]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.svg").read_text().startswith("<svg")


def test_before_against_after(simulator, tmp_path):
    words = ("bench", "--url", simulator.url, *SHORT, "--concurrency", "1", "--requests", "2",
             "--repeats", "3", "--json")  # fmt: skip
    first = run(tmp_path, *words)
    found = json.loads(first.stdout)
    assert (first.returncode, first.stderr, found["ok"]) == (0, "", True)
    (tmp_path / "before.json").write_text(first.stdout)
    after = json.loads(run(tmp_path, *words, "--before", "before.json").stdout)
    assert [each["name"] for each in after["targets"]] == [
        f"before: {simulator.url}",
        simulator.url,
    ]
    assert (after["interleaved"], after["interrupted"]) == (False, False)
    assert {each["metric"] for each in after["ratios"]} == {m.name for m in compare.METRICS}
    assert any("not measured in turns" in line for line in after["warnings"])
    assert after["method"]["workload"]["prompt_tokens"] == 64


def test_a_key_that_is_refused_is_one_clear_line(tmp_path):
    simulator = Simulator(key="right")
    try:
        words = ("bench", "--url", simulator.url, "--key", "env:THE_KEY", *SHORT,
                 "--concurrency", "1", "--requests", "1")  # fmt: skip
        refused = run(tmp_path, *words, THE_KEY="sk-wrong")
        allowed = run(tmp_path, *words, THE_KEY="right")
    finally:
        simulator.stop()
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last == f"{simulator.url} refuses the key of env:THE_KEY (status 401)"
    assert "sk-wrong" not in refused.stdout + refused.stderr
    assert allowed.returncode == 0, allowed
    assert "right" not in allowed.stdout + allowed.stderr


def test_a_target_that_is_down_is_one_clear_line(tmp_path):
    done = run(tmp_path, "bench", "--url", "http://127.0.0.1:1", "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problem["message"].startswith("http://127.0.0.1:1 cannot be reached: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "say either --phase or --url"),
        ({"url": URL, "phase": "pilot"}, "say either"),
        ({"phase": "pilot", "concurrency": "1,257"}, "256 requests at once at most"),
        ({"url": URL, "against": "pilot", "concurrency": "300"}, "256 requests"),
        ({"url": URL, "concurrency": "few"}, "is a whole number, not 'few'"),
        ({"url": URL, "concurrency": ","}, "--concurrency is whole numbers"),
        ({"url": URL, "api": "grpc"}, "--api is one of openai, ollama"),
        ({"url": URL, "user": "web"}, "--user is of a phase"),
        ({"phase": "local", "key": "env:X"}, "--key and --api are of a URL"),
        ({"url": URL, "seconds": "1", "requests": "1"}, "exclude each other"),
        ({"url": URL, "shared_prefix": "512"}, "leaves nothing of a prompt"),
        ({"url": URL, "against": URL, "before": "z"}, "exclude each other"),
    ],
)
def test_wrong_usage(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exit) as told:
        namespace["bench"](Context(), **words)
    shown = capsys.readouterr()
    assert (told.value.code, shown.out) == (2, "")
    assert said in shown.err


def test_without_the_extra_it_says_which(tmp_path):
    script = "import sys; sys.modules['uvloop'] = None; from inferfleet.cli import main; main()"
    done = run(tmp_path, "bench", "--url", "http://x", command=[sys.executable, "-c", script])
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "bench needs uvloop, which is not here: pip install 'inferfleet[bench]'"
    )


def test_interrupted_it_reports_what_was_measured(simulator, tmp_path):
    words = ("bench", "--url", simulator.url, *SHORT, "--concurrency", "1,2", "--json")
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    wanted = simulator.finished() + 8
    while simulator.finished() < wanted:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told, wrong = process.communicate(timeout=10)
    assert (process.returncode, wrong) == (130, "")
    found = json.loads(told)
    (only,) = found["targets"][0]["steps"]
    assert found["interrupted"]
    assert not only["complete"]
    assert (only["requests"] >= 3, only["errors"]) == (True, {})
