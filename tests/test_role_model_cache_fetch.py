"""The program that keeps models whole, against a hub on loopback and the real `hf`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakehub import Hub, serving

PROGRAM = Path(__file__).parent.parent / "roles/model_cache/models.py"
HF = Path(sys.executable).with_name("hf")
REVISION = "8e8ed243bbe6f9a5aff549a0924562fc719b2b8a"
FOLDER = f"coder@{REVISION}"
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": WEIGHTS,
    "tokenizer/tokenizer.json": b"{}",
    "original/consolidated.00.pth": b"twice" * 1000,
}
KEPT = sorted(name for name in FILES if not name.startswith("original/"))

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("models", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


models = load()


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-I", PROGRAM, *arguments]
    return subprocess.run(
        list(map(str, argv)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    if not HF.exists():
        pytest.skip("the hf command is not here: pip install huggingface_hub")
    with serving(Hub("org/coder", REVISION, dict(FILES))) as served:
        yield served


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The folder that is fetched to."""
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def config(target: Path, source: dict[str, Any], **more: Any) -> Path:
    entry = {"name": "coder", "folder": FOLDER, "repository": "org/coder", "revision": REVISION}
    whole = {"target": str(target), "source": source, "models": [entry]}
    whole |= {"reserve_gib": 0, "prune": False} | more
    path = target.parent / "models.json"
    path.write_text(json.dumps(whole))
    return path


def from_hub(hub: Hub, target: Path, **more: Any) -> Path:
    source = {"endpoint": hub.url, "exclude": ["original/*"], "command": str(HF)}
    return config(target, source, **more)


def fetched(path: Path, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("fetch", path, HF_HOME=str(home), HF_HUB_DISABLE_XET="1", **environment)


def complete(folder: Path) -> bool:
    return run("check", folder).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder with one complete model, as it is carried into an air gap."""
    folder = tmp_path / "disk" / FOLDER
    for name in KEPT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
    assert run("seal", folder, "coder", REVISION).returncode == 0
    return folder.parent


def unshared(script: str) -> subprocess.CompletedProcess[str]:
    """The script's end, run where it may mount; nobody else sees what it mounts."""
    may = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*may, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return subprocess.run([*may, script], capture_output=True, text=True, timeout=30, check=False)


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# From a hub


def test_how_far_a_download_has_come_is_told_while_it_runs(tmp_path, monkeypatch):
    """The download stands in its middle until that has been said."""
    gate, part = tmp_path / "gate", tmp_path / "models/.cache/a.incomplete"
    part.parent.mkdir(parents=True)
    script = f"head -c 500 /dev/zero >{part}; until [ -e {gate} ]; do sleep 0.02; done; exit 3"
    told = []

    def say(line):
        told.append(line)
        if "50 %" in line:
            gate.touch()

    monkeypatch.setattr(models, "say", say)
    monkeypatch.setattr(models, "LOOK_SECONDS", 0.02)
    with subprocess.Popen(["sh", "-c", script]) as process:
        assert models.watched(process, "coder", tmp_path / "models", 1000) == 3
    assert told[-1] == "coder: 50 % of 0.0 GiB"
    assert len(set(told)) == len(told)


def test_a_model_is_fetched_whole_with_a_manifest_that_says_what_belongs_to_it(
    hub, target, tmp_path
):
    done = fetched(from_hub(hub, target), tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert names(target) == sorted(f"{FOLDER}/{n}" for n in [*KEPT, models.MANIFEST])
    manifest = json.loads((target / FOLDER / models.MANIFEST).read_text())
    assert {n: f["size"] for n, f in manifest["files"].items()} == {n: len(FILES[n]) for n in KEPT}
    assert manifest["revision"] == REVISION
    assert run("verify", target / FOLDER).returncode == 0
    assert all(p.stat().st_mode & stat.S_IROTH for p in target.rglob("*"))


def test_what_is_complete_is_not_asked_for_again(hub, target, tmp_path):
    path = from_hub(hub, target)
    fetched(path, tmp_path / "home")
    hub.asked.clear()
    assert fetched(path, tmp_path / "home").returncode == 0
    assert hub.asked == []


def test_a_download_cut_short_is_not_complete_and_is_gone_on_with(hub, target, tmp_path):
    hub.cut = True
    path = from_hub(hub, target)
    done = fetched(path, tmp_path / "home", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == models.TRY_AGAIN, done.stderr
    assert not (target / FOLDER).exists()
    assert not complete(target / FOLDER)
    assert not complete(target / f"{FOLDER}.partial")
    hub.cut = False
    hub.asked.clear()
    done = fetched(path, tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert complete(target / FOLDER)
    assert hub.sent("config.json") == [], "what was there is not fetched twice"
    assert len(hub.sent("model.safetensors")) == 1


def test_what_is_not_as_the_hub_says_is_never_complete(hub, target, tmp_path):
    hub.lies = True
    done = fetched(from_hub(hub, target), tmp_path / "home")
    assert done.returncode == models.TRY_AGAIN
    assert f"not as the source says, so removed: {', '.join(KEPT)}" in done.stderr
    assert not complete(target / FOLDER)


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, target, tmp_path):
    hub.token = "hf_" + "secret"
    path = from_hub(hub, target)
    done = fetched(path, tmp_path / "home")
    assert done.returncode == models.NEEDS_A_PERSON
    assert "answers 401: it needs a token" in done.stderr
    (tmp_path / "token").write_text(hub.token + "\n")
    done = fetched(path, tmp_path / "home", CREDENTIALS_DIRECTORY=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert hub.token not in done.stdout + done.stderr


def test_a_repository_that_is_not_there_is_not_asked_for_for_ever(hub, target, tmp_path):
    hub.repository = "org/other"
    done = fetched(from_hub(hub, target), tmp_path / "home")
    assert done.returncode == models.NEEDS_A_PERSON
    assert "org/coder" in done.stderr
    assert "no such repository or revision" in done.stderr


def test_a_hub_that_is_away_is_tried_again(target, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = fetched(from_hub(Hub("", "", {}, url=url), target), tmp_path / "home")
    assert done.returncode == models.TRY_AGAIN
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "--token", models.MANIFEST])
def test_a_name_that_leaves_the_folder_is_refused(target, tmp_path, name):
    with serving(Hub("org/coder", REVISION, {name: b"x"})) as hub:
        done = fetched(from_hub(hub, target), tmp_path / "home")
    assert done.returncode == models.NEEDS_A_PERSON
    assert f"cannot be called {name!r}" in done.stderr


# The disk


def test_what_does_not_fit_is_refused_before_the_first_byte(hub, target, tmp_path):
    done = fetched(from_hub(hub, target, reserve_gib=10**6), tmp_path / "home")
    assert done.returncode == models.NEEDS_A_PERSON
    assert "GiB free" in done.stderr
    assert [line for line in hub.asked if "/resolve/" in line] == []
    assert names(target) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_that_looks_complete(tmp_path, disk):
    target = tmp_path / "full"
    target.mkdir()
    path = config(target, {"directory": str(disk)})
    # the check of free space is passed, then another writer takes the rest
    code = (
        f"import runpy, sys; main = runpy.run_path('{PROGRAM}')['main']; "
        "main.__globals__['refuse_too_much'] = lambda *_: None; "
        f"sys.exit(main(['fetch', '{path}']))"
    )
    done = unshared(
        f"mount -t tmpfs -o size=1100k tmpfs {target}; head -c 200k /dev/zero > {target}/other; "
        f'{sys.executable} -c "{code}"; echo status $?; ls -A {target}; '
        f"{sys.executable} {PROGRAM} check {target / FOLDER}"
    )
    assert f"status {models.TRY_AGAIN}" in done.stdout, done.stderr
    assert "No space left on device" in done.stderr
    assert FOLDER not in done.stdout.split()
    assert f"{FOLDER}.partial" in done.stdout.split()
    assert done.returncode == 1


# From a folder: air gap, and staging


def test_a_folder_is_copied_and_compared_with_its_manifest(disk, target):
    done = run("fetch", config(target, {"directory": str(disk)}))
    assert done.returncode == 0, done.stderr
    assert names(target / FOLDER) == names(disk / FOLDER)
    assert run("verify", target / FOLDER).returncode == 0


def test_a_folder_without_a_manifest_or_with_half_a_file_is_no_source(disk, target):
    path = config(target, {"directory": str(disk)})
    with (disk / FOLDER / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    done = run("fetch", path)
    assert done.returncode == models.TRY_AGAIN
    assert "model.safetensors has 1000 of 1024000 bytes" in done.stderr
    (disk / FOLDER / models.MANIFEST).unlink()
    assert models.MANIFEST in run("fetch", path).stderr
    assert names(target) == []


def test_a_copy_of_other_content_is_not_kept(disk, target):
    (disk / FOLDER / "config.json").write_bytes(FILES["config.json"].swapcase())
    done = run("fetch", config(target, {"directory": str(disk)}))
    assert done.returncode == models.TRY_AGAIN
    assert "not as the source says, so removed: config.json" in done.stderr
    assert not complete(target / FOLDER)


@pytest.mark.parametrize("moment", ["copyfile", "complete", "strip", "seal", "sync"])
def test_killed_at_any_moment_it_is_old_or_new_and_never_half(disk, target, moment):
    path = config(target, {"directory": str(disk)})
    code = (
        f"import os, runpy, shutil; g = runpy.run_path({str(PROGRAM)!r})['main'].__globals__\n"
        "def die(*_): os.kill(os.getpid(), 9)\n"
        f"if {moment!r} == 'copyfile': shutil.copyfile = die\n"
        f"elif {moment!r} == 'sync': os.sync = die\n"
        f"else: g[{moment!r}] = die\n"
        f"g['main'](['fetch', {str(path)!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False, timeout=30)
    assert killed.returncode == -signal.SIGKILL
    assert not complete(target / FOLDER)
    done = run("fetch", path)
    assert done.returncode == 0, done.stderr
    assert "taking over from a writer that is gone" in done.stdout
    assert complete(target / FOLDER)
    assert names(target) == names(disk)


def test_a_model_that_lost_a_file_is_completed_again(disk, target):
    path = config(target, {"directory": str(disk)})
    run("fetch", path)
    (target / FOLDER / "config.json").unlink()
    assert not complete(target / FOLDER)
    assert run("fetch", path).returncode == 0
    assert complete(target / FOLDER)


# What engines ask


def test_half_a_model_under_its_final_name_is_seen(disk):
    folder = disk / FOLDER
    assert complete(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(len(WEIGHTS) // 2)
    done = run("check", folder)
    assert done.returncode == 1
    assert "model.safetensors has 512000 of 1024000 bytes" in done.stderr


def test_changed_content_is_seen_by_verify_alone(disk):
    (disk / FOLDER / "config.json").write_bytes(FILES["config.json"].swapcase())
    assert run("check", disk / FOLDER).returncode == 0
    done = run("verify", disk / FOLDER)
    assert done.returncode == 1
    assert "config.json is damaged" in done.stderr


def test_check_waits_for_a_model_that_is_on_its_way(disk):
    folder = disk / FOLDER
    folder.rename(disk / f"{FOLDER}.partial")
    argv = [sys.executable, "-I", PROGRAM, "check", "--wait", "30", folder]
    with subprocess.Popen(argv) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
        (disk / f"{FOLDER}.partial").rename(folder)
        assert waiting.wait(10) == 0


def test_locks_on_a_read_only_share_make_nobody_wait(disk, tmp_path, target):
    """What huggingface_hub does there by itself: waits for ever for a lock nobody holds."""
    lock = {"host": "gone", "boot": "", "pid": 1, "started": "1"}
    (disk / models.LOCK).write_text(json.dumps(lock))
    notes = disk / FOLDER / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    (notes / "config.json.lock").touch()
    script = (
        f"mount --bind {disk} {disk} && mount -o remount,ro,bind {disk} && ! touch {disk}/x 2>&- "
        f"&& {sys.executable} {PROGRAM} check {disk / FOLDER} "
        f"&& {sys.executable} {PROGRAM} fetch {config(target, {'directory': str(disk)})}"
    )
    started = time.monotonic()
    done = unshared(script)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 10
    assert names(target / FOLDER) == sorted([*KEPT, models.MANIFEST])


# One writer


def test_a_second_writer_is_turned_away_and_told_who_writes(disk, target):
    path = config(target, {"directory": str(disk)})
    with models.only_writer(target):
        done = run("fetch", path)
        assert done.returncode == models.TRY_AGAIN
        assert f"written by process {os.getpid()} of {socket.gethostname()}" in done.stderr
    assert run("fetch", path).returncode == 0
    assert not (target / models.LOCK).exists()


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, False),
        ({"pid": 2**22 + 1}, True),  # more than any pid
        ({"started": "1"}, True),  # the number now belongs to another process
        ({"boot": "another"}, True),
        ({"host": "another", "boot": "another"}, False),  # who can tell from here?
    ],
)
def test_only_the_lock_of_a_process_that_is_gone_is_taken_over(target, change, taken):
    (target / models.LOCK).write_text(json.dumps(models.me() | change))
    if taken:
        with models.only_writer(target):
            assert json.loads((target / models.LOCK).read_text()) == models.me()
    else:
        with (
            pytest.raises(models.Failed, match="is being written by process"),
            models.only_writer(target),
        ):
            pass


# Garbage


def test_only_models_nobody_wants_or_reads_are_removed(disk, target):
    other, read = (f"{name}@{REVISION[::-1]}" for name in ("old", "read"))
    for name in (other, f"{other}.partial", read, "notes@home", f"half@{REVISION}.leaving"):
        shutil.copytree(disk / FOLDER, target / name)
    (target / "file").touch()
    with (target / read / "model.safetensors").open("rb"):
        done = run("fetch", config(target, {"directory": str(disk)}, prune=True))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in target.iterdir()) == sorted([FOLDER, read, "notes@home", "file"])
    assert f"{read}: no deployment uses it, but a process still does; kept" in done.stdout
    run("fetch", config(target, {"directory": str(disk)}, prune=True))
    assert not (target / read).exists()


def test_without_prune_nothing_is_removed(disk, target):
    shutil.copytree(disk / FOLDER, target / f"old@{REVISION}")
    assert run("fetch", config(target, {"directory": str(disk)})).returncode == 0
    assert complete(target / f"old@{REVISION}")
