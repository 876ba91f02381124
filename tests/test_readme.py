"""README's commands do what it says: each console block is run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from labkit import require_lab

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(kind: str) -> list[str]:
    """The lines after `$ ` in the blocks marked ```<kind>."""
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def run(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(line)
    return subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a fresh clone, where the commands may write."""
    for name in ("inventory", "roles", "templates"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tasks.py", tmp_path)
    return tmp_path


def test_commands_without_hosts(clone: Path) -> None:
    lines = commands("console")
    assert "invoke check" in lines
    for line in lines:
        done = run(line, clone)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


@pytest.mark.lab
def test_commands_of_a_rehearsal(clone: Path) -> None:
    require_lab()
    label = f"readme-{os.getpid()}"
    lines = commands("console lab")
    assert len(lines) == 5
    try:
        for line in lines:
            own = line.replace("labs/lab/", f"labs/{label}/")
            own += f" --name {label}" if "invoke lab" in line else ""
            done = run(own, clone)
            assert done.returncode == 0, f"{own}: {done.stdout}{done.stderr}"
    finally:
        run(f"invoke lab --down --name {label}", clone)


def test_every_task_is_in_the_table(clone: Path) -> None:
    listed = run("invoke --list", clone).stdout
    tasks = re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE)
    assert len(tasks) >= 10
    for task in tasks:
        assert re.search(rf"^\| `{task}\b", TEXT, re.MULTILINE), f"README's table lacks {task}"


def test_the_inventory_on_one_screen_is_right(tmp_path: Path) -> None:
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    more = "  lb-01: {address: 192.0.2.21, groups: [balancers]}\nmodels:"
    whole = yaml.replace("\nmodels:", f"\n{more}", 1)
    whole = whole.replace("  gpu-servers: {}\n", "  gpu-servers: {}\n  balancers: {}\n")
    (inventory / "fleet.yml").write_text(whole, encoding="utf-8")
    done = run(f"inferfleet check --inventory {inventory}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_gateway_on_half_a_screen_is_right(tmp_path: Path) -> None:
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (gateway,) = re.findall(r"^    roles:\n      gateway:\n(?:        .*\n)+", TEXT, re.MULTILINE)
    whole = yaml.partition("    roles:\n")[0] + gateway
    more = "  gw-01: {address: 192.0.2.21, groups: [gateways]}\nmodels:"
    whole = whole.replace("\nmodels:", f"\n{more}", 1).replace("balancers", "gateways")
    whole = whole.replace("  gpu-servers: {}\n", "  gpu-servers: {}\n  gateways: {}\n")
    inventory = tmp_path / "inventory"
    inventory.mkdir()
    (inventory / "fleet.yml").write_text(whole, encoding="utf-8")
    done = run(f"inferfleet check --inventory {inventory}", tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_two_make_targets_exist() -> None:
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
