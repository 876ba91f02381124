"""Configurations of clients, read by the clients: most ask a real gateway, by TLS of our CA."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys

import pytest
import yaml
from clientkit import KEY, MODEL, Service, alone, packages, service

from inferfleet.clients import Access, Endpoint, Served, configuration

SAID = "This is a rehearsal"
MODELS = (
    Served(MODEL, 32768, 8192, tools=True),
    Served("eyes", 16384, 4096, vision=True),
    Served("bge-m3", 8192, 2048, embeddings=True),
)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with service(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def text(client: str, found: Service, *, ca: str = "", models: tuple[Served, ...] = MODELS[:1]):
    own = Endpoint("inferfleet-p", f"{found.url}/v1", models)
    access = Access("p", (own,), "ALICE_KEY", ca, ollama=found.url, gateway=True)
    return configuration(client, access).text


def ran(argv, folder, timeout=60, **environment):
    return subprocess.run(
        argv,
        cwd=folder,
        env=alone(folder, **environment),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )


# programs


@pytest.mark.parametrize("client", ["openai", "huggingface", "ollama"])
def test_programs_stream_an_answer_with_the_key_and_the_ca_alone(gateway, tmp_path, client):
    program = tmp_path / "program.py"
    program.write_text(text(client, gateway, ca=str(gateway.ca)))
    run = functools.partial(ran, [sys.executable, "-W", "error", program], tmp_path)
    done = run(ALICE_KEY=KEY)
    assert (done.returncode, SAID in done.stdout) == (0, True), done.stderr
    refused = run(ALICE_KEY="another")
    assert refused.returncode != 0
    assert "401" in refused.stderr or "key" in refused.stderr.splitlines()[-1]
    assert "KeyError: 'ALICE_KEY'" in run().stderr
    program.write_text(text(client, gateway))
    assert "CERTIFICATE_VERIFY_FAILED" in run(ALICE_KEY=KEY).stderr


def test_curl_streams_events_and_the_key_is_on_no_command_line(gateway, tmp_path):
    shell = ["/bin/sh", "-euc", text("curl", gateway, ca=str(gateway.ca))]
    assert shutil.which("curl")
    done = ran(shell, tmp_path, ALICE_KEY=KEY)
    assert done.returncode == 0, done.stderr
    events = [line for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert len(events) > 3
    assert events[-1] == "data: [DONE]"
    refused = ran(shell, tmp_path, ALICE_KEY="another")
    assert (refused.returncode, "401" in refused.stderr) == (22, True)
    assert "ALICE_KEY" in ran(shell, tmp_path).stderr
    assert f"-H {KEY}" not in shell[2]
    (line,) = [line for line in shell[2].splitlines() if "curl" in line]
    assert "ALICE_KEY" not in line
    trusting = ["/bin/sh", "-euc", text("curl", gateway)]
    assert ran(trusting, tmp_path, ALICE_KEY=KEY).returncode == 60


# opencode


def opencode(gateway, folder, *words, **environment):
    (program,) = packages().glob("opencode-linux-*/bin/opencode")
    (folder / "opencode.json").write_text(text("opencode", gateway, models=MODELS))
    quiet = {"OPENCODE_DISABLE_MODELS_FETCH": "1", "OPENCODE_DISABLE_AUTOUPDATE": "1"}
    return ran([program, *words], folder, 120, **quiet, **environment)


def test_opencode_keeps_every_key_of_its_configuration(gateway, tmp_path):
    done = opencode(gateway, tmp_path, "debug", "config", ALICE_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    read = json.loads(done.stdout)
    wrote = json.loads((tmp_path / "opencode.json").read_text())
    wrote["provider"]["inferfleet-p"]["options"]["apiKey"] = "***"  # read, and so masked
    assert {name: read[name] for name in wrote} == wrote
    assert list(wrote["provider"]["inferfleet-p"]["models"]) == [MODEL, "eyes"]


def test_opencode_answers_through_the_gateway(gateway, tmp_path):
    words = ["run", "say hello"]
    done = opencode(gateway, tmp_path, *words, ALICE_KEY=KEY, NODE_EXTRA_CA_CERTS=str(gateway.ca))
    assert SAID in done.stdout, done.stdout + done.stderr


# Continue

_READ = """
import { readFileSync } from "node:fs";
import { configYamlSchema, parseConfigYaml, validateConfigYaml } from "%s";
const found = parseConfigYaml(readFileSync(process.argv[2], "utf-8"));
const errors = validateConfigYaml(found);
console.log(JSON.stringify({ errors, found: configYamlSchema.parse(found) }));
"""


def test_continue_keeps_every_key_of_its_configuration(gateway, tmp_path):
    entry = packages() / "@continuedev/config-yaml/dist/index.js"
    script, config = tmp_path / "read.mjs", tmp_path / "config.yaml"
    script.write_text(_READ % entry)
    config.write_text(text("continue", gateway, ca="/etc/fleet.pem", models=MODELS))
    done = ran(["node", script, config], tmp_path)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["errors"] == []
    assert read["found"] == yaml.safe_load(config.read_text())  # what it does not know, it drops


# Cline


def test_cline_takes_the_command(gateway, tmp_path):
    (program,) = packages().glob("@cline/cli-linux-*/bin/cline")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cline").symlink_to(program)
    script = text("cline", gateway).replace("cline auth", "bin/cline auth")
    done = ran(["/bin/sh", "-euc", script], tmp_path, ALICE_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,) = tmp_path.glob(".cline/**/providers.json")
    (provider,) = json.loads(stored.read_text())["providers"].values()
    assert provider["settings"] == {
        "provider": "openai-compatible",
        "apiKey": KEY,
        "model": MODEL,
        "baseUrl": f"{gateway.url}/v1",
    }
    assert "ALICE_KEY" in ran(["/bin/sh", "-euc", script], tmp_path).stderr
