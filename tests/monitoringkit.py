"""Debian's Prometheus for tests: its programs, and its packages for hosts of the lab."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import pytest


@functools.cache
def prometheus() -> Path:
    """The folder that tests/tools/prometheus fills; skips where there is no apt."""
    tool = Path(__file__).parent / "tools" / "prometheus"
    done = subprocess.run([tool], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"no Prometheus here: {done.stderr[-300:]}")
    return Path(done.stdout.strip())


def programs() -> Path:
    """The folder of prometheus, promtool and prometheus-node-exporter."""
    return prometheus() / "usr" / "bin"
