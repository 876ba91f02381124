"""What the model cache puts on writers, on readers and on other hosts, and what engines ask."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import make
import pytest

from inferfleet.model import Artefact, Bundle, Ensure
from inferfleet.modelpath import PROGRAM, escaped

REVISION = "8e8ed243bbe6f9a5aff549a0924562fc719b2b8a"
FOLDER = f"coder@{REVISION}"
MODELS = "/srv/inferfleet/models"
FLEET = """\
hosts:
  gpu-01: {address: 192.0.2.11, private_address: 198.51.100.11, gpus: [{model: L40S}]}
  gpu-02: {address: 192.0.2.12, private_address: "2001:db8::12", gpus: [{model: L40S}]}
  store-01: {address: 192.0.2.31, private_address: "2001:db8::31"}
models:
  coder: {repository: org/coder, revision: %s}
  chat: {repository: "chat:7b"}
deployments:
  coder:
    {engine: vllm, model: coder, hosts: [gpu-01], port: 8000, api_key: !env K,
     gpus_per_instance: 1, options: {runtime: %s}}
  chat: {engine: ollama, model: chat, hosts: [gpu-02], port: 8000, gpus_per_instance: 1}
phases:
  p: {users: 1, why: w, hosts: [all], deployments: [coder, chat], roles: {model_cache: %s}}
"""


def bundles(folder: Path, settings: str, runtime: str = "native") -> dict[str, Bundle]:
    project = make.project(folder, fleet=FLEET % (REVISION, runtime, settings))
    plan = project.plan("p")
    return {bundle.host.name: bundle for bundle in project.bundles(plan, plan.hosts)}


def files(bundle: Bundle, role: str = "model_cache") -> dict[str, Artefact]:
    return {
        wanted.path: wanted
        for name, part in bundle.parts
        for wanted in part
        if name == role and isinstance(wanted, Artefact)
    }


def text(bundle: Bundle, path: str) -> str:
    (found,) = [a for a in bundle.artefacts if a.path == path]
    return found.content.decode()


def ensures(bundle: Bundle) -> list[Ensure]:
    (part,) = [part for name, part in bundle.parts if name == "model_cache"]
    return [wanted for wanted in part if isinstance(wanted, Ensure)]


def directives(unit: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.replace("\\\n", "").splitlines():
        if re.match(r"[A-Z]\w+=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(" ".join(value.split()))
    return found


@pytest.fixture
def shared(tmp_path):
    """A writer that exports to two readers."""
    return bundles(tmp_path, "{hosts: [all], writer: store-01, token: !env T}")


# One writer


def test_the_writer_alone_fetches_and_exports_to_all_others_read_only(shared):
    assert sorted(files(shared["store-01"])) == [
        "/etc/exports.d/inferfleet-models.exports",
        "/etc/inferfleet/model_cache/models.json",
        "/etc/inferfleet/model_cache/token",
        "/etc/systemd/system/inferfleet-models.service",
        PROGRAM,
    ]
    exports = text(shared["store-01"], "/etc/exports.d/inferfleet-models.exports").splitlines()
    path, *clients = exports[-1].split(" ")
    assert path == MODELS
    assert clients == [f"{a}(ro,sync,no_subtree_check,root_squash)" for a in (
        "198.51.100.11", "2001:db8::12"
    )]  # fmt: skip


def test_readers_mount_read_only_and_get_no_token(shared):
    unit = escaped(MODELS)
    assert sorted(files(shared["gpu-01"])) == [
        f"/etc/systemd/system/{unit}.automount",
        f"/etc/systemd/system/{unit}.mount",
        PROGRAM,
    ]
    mount = directives(text(shared["gpu-01"], f"/etc/systemd/system/{unit}.mount"))
    options = mount["Options"][0].split(",")
    assert mount["What"] == [f"[2001:db8::31]:{MODELS}"]
    assert {"ro", "hard", "nfsvers=4.2", "nconnect=8", "retry=0", "nosuid", "nodev"} <= {*options}
    assert "rw" not in options
    assert mount["StartLimitIntervalSec"] == ["0"]


def test_the_writer_is_told_of_the_models_that_engines_of_the_phase_read(shared):
    config = json.loads(text(shared["store-01"], "/etc/inferfleet/model_cache/models.json"))
    assert config["models"] == [
        {"name": "coder", "folder": FOLDER, "repository": "org/coder", "revision": REVISION}
    ], "Ollama keeps its own"
    assert config["target"] == MODELS
    assert config["prune"] is False, "other phases may use what this one does not"


def test_the_token_is_a_credential_of_the_fetching_unit(shared):
    token = files(shared["store-01"])["/etc/inferfleet/model_cache/token"]
    assert (token.mode, token.secret) == (0o600, True)
    unit = directives(text(shared["store-01"], "/etc/systemd/system/inferfleet-models.service"))
    assert unit["LoadCredential"] == ["token:/etc/inferfleet/model_cache/token"]
    assert unit["User"] == ["inferfleet-models"]
    assert unit["Type"][-1] == "oneshot"
    assert unit["ReadWritePaths"] == [MODELS]


def test_exporting_comes_before_fetching_which_may_take_hours(shared):
    titles = [ensure.title for ensure in ensures(shared["store-01"])]
    assert titles.index("nfs-server.service is enabled and running") < titles.index(
        "models are complete: coder"
    )


def test_readers_wait_for_the_writer_and_a_dead_one_does_not_hang_the_test(shared):
    (wait,) = [e for e in ensures(shared["gpu-01"]) if not e.run]
    assert wait.title == "models are complete on the share: coder"
    assert wait.test.startswith("timeout -k 1 20 python3 -I ")
    assert wait.test.endswith(f"check {MODELS}/{FOLDER}")
    assert [e for e in ensures(shared["gpu-02"]) if not e.run] == []


def test_a_share_that_is_there_is_mounted_to_write_by_the_writer_alone(tmp_path):
    settings = (
        "{hosts: [all], writer: gpu-02, share: 'nas.example.com:/llm', path: /mnt/llm-models}"
    )
    found = bundles(tmp_path, settings)
    path = "/etc/systemd/system/mnt-llm\\x2dmodels"
    access = {}
    for name, bundle in found.items():
        mount = directives(text(bundle, f"{path}.mount"))
        assert mount["What"] == ["nas.example.com:/llm"]
        access[name] = mount["Options"][0].split(",")[0]
        assert "/etc/exports.d/inferfleet-models.exports" not in files(bundle)
    assert access == {"gpu-01": "ro", "gpu-02": "rw", "store-01": "ro"}
    unit = text(found["gpu-02"], "/etc/systemd/system/inferfleet-models.service")
    assert "After=mnt-llm\\x2dmodels.automount\n" in unit
    assert "RequiresMountsFor" not in unit


# Without one, and staged


def test_without_a_writer_each_host_fetches_its_own(tmp_path):
    found = bundles(tmp_path, "{hosts: [all], directory: /media/disk}")
    for name, models in (("gpu-01", ["coder"]), ("gpu-02", []), ("store-01", [])):
        config = json.loads(text(found[name], "/etc/inferfleet/model_cache/models.json"))
        assert [model["name"] for model in config["models"]] == models
        assert config["source"] == {"directory": "/media/disk"}
        assert not [e for e in ensures(found[name]) if "huggingface" in e.title]


def test_staging_copies_from_the_share_and_removes_what_is_not_used(tmp_path):
    found = bundles(tmp_path, "{hosts: [all], writer: store-01, staging: /var/lib/models}")
    config = json.loads(text(found["gpu-01"], "/etc/inferfleet/model_cache/staging.json"))
    assert config["source"] == {"directory": MODELS}
    assert (config["target"], config["prune"]) == ("/var/lib/models", True)
    unit = directives(text(found["gpu-01"], "/etc/systemd/system/inferfleet-staging.service"))
    assert unit["After"][-1] == f"{escaped(MODELS)}.automount"
    assert unit["CapabilityBoundingSet"] == ["", "CAP_SYS_PTRACE"]
    assert "/etc/inferfleet/model_cache/staging.json" not in files(found["store-01"])


# Engines


ENGINE = "/etc/systemd/system/inferfleet-coder-0.service"


@pytest.mark.parametrize("runtime", ["native", "docker"])
@pytest.mark.parametrize(
    ("settings", "folder", "after", "requires"),
    [
        ("{hosts: [all], writer: store-01}", MODELS, f"{escaped(MODELS)}.automount", False),
        ("{hosts: [all]}", MODELS, "inferfleet-models.service", True),
        (
            "{hosts: [all], writer: store-01, staging: /nvme}",
            "/nvme",
            "inferfleet-staging.service",
            True,
        ),
    ],
)
def test_an_engine_starts_on_a_whole_model_alone(
    tmp_path, runtime, settings, folder, after, requires
):
    bundle = bundles(tmp_path, settings, runtime)["gpu-01"]
    unit = directives(text(bundle, ENGINE))
    check = f"/usr/bin/python3 -I {PROGRAM} check --wait 60 {folder}/{FOLDER}"
    assert unit["ExecStartPre"][0] == check
    assert after in unit["After"]
    assert after in unit["Wants"]
    # were the share's mount required, one failure at boot would keep the engine down for good
    assert ("RequiresMountsFor" in unit) is requires


@pytest.mark.parametrize("runtime", ["native", "docker"])
def test_an_engine_reads_the_folder_and_asks_no_hub(tmp_path, runtime):
    bundle = bundles(tmp_path, "{hosts: [all]}", runtime)["gpu-01"]
    whole = "".join(a.content.decode() for a in files(bundle, "vllm").values())
    assert f"{MODELS}/{FOLDER}" in whole
    assert "--revision" not in whole
    assert "org/coder" not in whole
    if runtime == "docker":
        assert f'"{MODELS}/{FOLDER}:{MODELS}/{FOLDER}:ro"' in whole
        assert '"HF_HUB_OFFLINE": "1"' in whole
    else:
        assert 'Environment="HF_HUB_OFFLINE=1"' in whole


def test_a_host_without_the_cache_fetches_as_before(tmp_path):
    bundle = bundles(tmp_path, "{hosts: [gpu-02]}")["gpu-01"]
    unit = text(bundle, ENGINE)
    assert "org/coder" in unit
    assert "models.py" not in unit
    assert "HF_HUB_OFFLINE" not in unit


def test_a_rehearsal_needs_no_weights(tmp_path):
    project = make.project(tmp_path, fleet=FLEET % (REVISION, "native", "{hosts: [all]}"))
    plan = project.plan("p", rehearse=True)
    roles = {role for b in project.bundles(plan, plan.hosts) for role, _ in b.parts}
    assert roles == {"simulator"}


# What the check refuses


@pytest.mark.parametrize(
    ("settings", "revision", "said"),
    [
        ("{hosts: [gpu-*], writer: store-01}", REVISION, "writer: 'store-01' is not among the ro"),
        ("{hosts: [all], share: 'nas:/m'}", REVISION, "share: somebody has to fill the share"),
        ("{hosts: [all], staging: /srv/inferfleet}", REVISION, "must not lie in one another"),
        ("{hosts: [all], staging: /var/lib/inferfleet/m}", REVISION, "engines cannot read there"),
        (f"{{hosts: [all], directory: {MODELS}}}", REVISION, "must not lie in one another"),
        ("{hosts: [all]}", "main", "model 'coder' needs a revision, the commit's 40 digits"),
        ("{hosts: [all], path: /srv/../etc}", REVISION, "does not fit"),
        ("{hosts: [all], token: hf_abc}", REVISION, "a secret written in clear"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, settings, revision, said):
    found = make.problems(make.write(tmp_path, fleet=FLEET % (revision, "native", settings)))
    assert len(found) == 1, found
    assert said in found[0]


# Read by their readers


@pytest.mark.parametrize("path", [MODELS, "/mnt/llm-models", "/a.b/_c-d", "/x"])
def test_units_are_named_as_systemd_names_them(path):
    named = subprocess.run(
        ["systemd-escape", "--path", path], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert escaped(path) == named


@pytest.mark.parametrize(
    "settings",
    [
        "{hosts: [all], writer: store-01, token: !env T, staging: /nvme-1/models}",
        "{hosts: [all], writer: store-01, share: 'nas.example.com:/llm', path: /mnt/llm-models}",
    ],
)
def test_systemd_reads_every_unit_without_a_word(tmp_path, settings):
    for name, bundle in bundles(tmp_path / "project", settings).items():
        folder = tmp_path / name
        folder.mkdir()
        units = [a for a in files(bundle).values() if "/systemd/" in a.path]
        for unit in units:
            (folder / Path(unit.path).name).write_bytes(unit.content)
        paths = sorted(map(str, folder.iterdir()))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", *paths],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
