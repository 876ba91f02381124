"""The gateway's measurement: its arithmetic, and one small run against the stand-in itself."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def parts():
    """The modules table, measures and peers of bench/gateway."""
    sys.path.insert(0, str(BENCH))
    try:
        yield lambda name: importlib.import_module(f"gateway.{name}")
    finally:
        sys.path.remove(str(BENCH))


def test_the_round_counts_in_which_it_waited_least(parts):
    slow = {"requests": {"requests_per_s": 9.0, "waited_percent": 20.0}}
    good = {
        "requests": {"requests_per_s": 8.0, "waited_percent": 2.0},
        "memory": {"resident_mb": 7},
    }
    assert parts("table").summary([slow, good, slow]) == {
        "requests_per_s": 8.0,
        "waited_percent": 2.0,
        "resident_mb": 7,
    }


def test_what_a_gateway_adds_is_the_difference_to_the_engine_alone(parts):
    added = parts("measures").added
    found = {"p50_ms": 3.0, "p50_alone_ms": 0.1, "path_p99_ms_100": 2.5}
    direct = {"p50_ms": 0.5, "p50_alone_ms": 0.2}
    assert added(found, direct) == {"added_ms": 2.5, "added_alone_ms": 0.0}


@pytest.mark.parametrize(
    ("sense", "limit", "ratio", "value", "other", "reached"),
    [
        ("at least", 30, True, 6000, 200, True),
        ("at least", 30, True, 5999, 200, False),
        ("at most", 1 / 15, True, 1, 15, True),
        ("at most", 5, False, math.inf, None, False),
        ("at most", 0, False, 0, None, True),
        ("at least", 30, True, 6000, None, None),
        ("at most", 5, False, None, 3, None),
    ],
)
def test_a_want_is_reached_at_its_limit(parts, sense, limit, ratio, value, other, reached):
    want = parts("table").Want("requests_per_s", sense, limit, ratio)
    assert want.reached(value, other) is reached


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (math.inf, "never"), (65625.4, "65,625"), (0, "0"), (0.0351, "0.0351")],
)
def test_numbers_keep_three_digits(parts, value, text):
    assert parts("table").number(value) == text


def test_shares_read_as_people_say_them(parts):
    share = parts("table").share
    assert (share(6000, 200), share(1, 20), share(math.inf, 2), share(1, None)) == (
        "30 x",
        "1/20",
        "-",
        "-",
    )


def test_every_want_has_a_title_and_prints(parts):
    table = parts("table")
    mine = {want.figure: 1.0 for want in table.WANTED}
    lines = table.verdicts(mine, {}).splitlines()
    assert len(lines) == len(table.WANTED) + 1
    assert lines[1].split()[-1] == "?"


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_load_generator_sees_what_the_engine_sent(parts, tmp_path, monkeypatch):
    processes, measures = parts("processes"), parts("measures")
    monkeypatch.setattr(processes, "CACHE", tmp_path / "cache")
    files = measures.bodies(tmp_path)
    with processes.Engine(tmp_path / "engine.log") as engine:
        processes.wait_for_port(engine)
        target = measures.Target("direct", engine.port, None, engine)
        plain, _ = target.load(processes.Load(files["small"], 4, 0.1))
        streams, _ = target.load(processes.Load(files["stream"], 4, 0.05))
        left = measures.leave(target, "early", 2000, True, 0)
    assert plain["good"] > 100
    assert plain["failed"] == 0
    assert (streams["good"], streams["chunks"], streams["differing"]) == (4, 4 * 64, 0)
    assert 0 < left < 500
    assert engine.process.poll() is not None


def test_a_peer_that_is_unknown_is_refused():
    command = [sys.executable, str(BENCH / "gateway.py"), "--peers", "haproxy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "there is no 'haproxy'" in done.stderr


def test_our_configuration_is_one_the_gateway_takes(parts, tmp_path):
    peers = parts("peers")
    config = pytest.importorskip("inferfleet.gateway.config")
    command = peers.ours(peers.Site(tmp_path, 8080, [8000, 8001]))
    found = config.load(Path(command[-1]))
    assert [i.url for i in found.pools["bench"].instances] == [
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
    ]
    assert json.loads((tmp_path / "keys.json").read_text())["keys"][0]["name"] == "bench"
