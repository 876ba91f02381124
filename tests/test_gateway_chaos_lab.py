"""The storm of bench/chaos.py, a short one: a production phase on real hosts, under load."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from labkit import leave_out, require_lab, take_down_remains

from inferfleet import lab as labs
from inferfleet.lab import wheels

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import chaos
from storm import faults, site
from storm.clients import KINDS

pytestmark = pytest.mark.lab

LABEL = "chaos"
SEED = 20
SECONDS = 45


def test_no_request_fails_while_an_engine_lives_and_nothing_leaks(tmp_path: Path) -> None:
    require_lab()
    folder = wheels.folder(print)
    if folder is None:
        leave_out("pip cannot fetch the gateway's wheels here")
    take_down_remains(LABEL)
    print(f"seed {SEED}")
    with labs.Lab.boot(site.NAMES, name=f"{LABEL}-{os.getpid()}") as lab:
        found = site.provisioned(lab, tmp_path / "project", folder, site.QUICK)
        report = chaos.weather(found, SECONDS, SEED, 32)
    print(chaos.shown(report))
    assert report.problems == []
    assert set(report.by_kind) == set(KINDS)
    assert set(report.faults) >= {"partition", *faults.ILLS}, "a storm in a teacup"
    assert report.ends["whole"] > 20 * len(KINDS)
    assert report.ends.get("cut", 0), "no stream was cut, so nothing is known of those"
