"""What a push shows while it runs: a live line per host, or now and then a line."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from inferfleet import report
from inferfleet.report import Progress


def output(line: str) -> dict[str, str]:
    return {"event": "output", "title": "model [coder]", "line": line}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `report` is told; a test sets them."""
    now = [1000.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def test_a_pipe_gets_a_line_of_output_each_ten_seconds(clock: list[float]) -> None:
    out = Console(file=io.StringIO(), width=1000)
    with Progress(out, ["gpu-01", "gpu-02"]) as progress:
        progress.event("gpu-01", {"event": "ensure", "title": "model [coder]", "state": "running"})
        for percent in range(0, 101):
            progress.event("gpu-01", output(f"pulling: {percent} % [x]"))
            clock[0] += 0.5
    lines = out.file.getvalue().splitlines()
    assert lines[:2] == [
        "gpu-01: model [coder] (running)",
        "gpu-01: model [coder]: pulling: 20 % [x]",
    ]
    assert [line.split()[-3] for line in lines[1:]] == ["20", "40", "60", "80", "100"]


def test_many_hosts_get_a_line_a_second_together(clock: list[float]) -> None:
    out = Console(file=io.StringIO(), width=1000)
    hosts = [f"gpu-{number:02}" for number in range(60)]
    with Progress(out, hosts) as progress:
        for _ in range(240):
            clock[0] += 0.5
            for host in hosts:
                progress.event(host, output("pulling"))
    assert len(out.file.getvalue().splitlines()) == 2 * len(hosts)


def test_a_terminal_gets_the_last_line_cut_to_its_width() -> None:
    out = Console(file=io.StringIO(), force_terminal=True, width=60, height=10, _environ={})
    with Progress(out, ["gpu-01", "gpu-02"]) as progress:
        progress.event("gpu-01", output("old"))
        progress.event("gpu-01", output("pulling: 42 % " + "of much " * 100))
        progress.event("gpu-02", {"event": "stage", "path": "/etc/a"})
        progress.live.refresh()
        shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue())
    last = [line.rstrip() for line in shown.replace("\r", "\n").splitlines() if line.strip()][-2:]
    assert last[0].startswith("gpu-01  model [coder]: pulling: 42 % of much")
    assert last[0].endswith("…")
    assert len(last[0]) <= 60
    assert last[1] == "gpu-02  writing files"


def test_a_very_long_line_is_cut() -> None:
    out = Console(file=io.StringIO(), width=1000)
    Progress(out, ["gpu-01"]).event("gpu-01", output("x" * 900))
    assert out.file.getvalue() == f"gpu-01: model [coder]: {'x' * 199}…\n"
