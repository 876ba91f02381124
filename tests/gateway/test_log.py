"""The request log: what a line holds, what it never holds, and what a stalled reader does."""

import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.gateway.log import Record, RequestIds, RequestLog

BEGAN = 1_795_000_000.25
PATIENCE = 20.0  # seconds until a condition that must come is given up


def record(**more):
    return Record("id-1", "POST", "/v1/chat/completions", **more)


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_became_of_a_request(tmp_path):
    path = tmp_path / "log"
    log = RequestLog(str(path))
    log.write(
        record(
            key="alice",
            model="coder",
            pool="coder",
            instance="coder-0@gpu-01",
            attempts=2,
            status=200,
            prompt_tokens=7,
            completion_tokens=3,
            bytes_in=100,
            bytes_out=900,
            queue_seconds=0.0,
            first_byte_seconds=0.1234567891,
            seconds=1.5,
        ),
        BEGAN,
    )
    log.write(record(status=401, error="key", client_left=True), BEGAN)
    log.close()
    assert lines(path) == [
        {
            "request_id": "id-1",
            "method": "POST",
            "path": "/v1/chat/completions",
            "time": "2026-11-18T11:06:40.250Z",
            "key": "alice",
            "model": "coder",
            "pool": "coder",
            "instance": "coder-0@gpu-01",
            "attempts": 2,
            "status": 200,
            "error": "",
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "bytes_in": 100,
            "bytes_out": 900,
            "queue_seconds": 0.0,
            "first_byte_seconds": 0.123457,
            "seconds": 1.5,
            "client_left": False,
        },
        msgspec.to_builtins(record(status=401, error="key", client_left=True))
        | {"time": "2026-11-18T11:06:40.250Z"},
    ]
    assert path.stat().st_mode & 0o007 == 0


@given(st.lists(st.floats(0, 4e9), min_size=1, max_size=20))
def test_the_time_is_utc_to_the_millisecond(moments):
    from inferfleet.gateway.log import _Clock

    clock = _Clock()
    for moment in moments:
        text = clock.text(moment)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
        assert 0 <= moment - datetime.fromisoformat(text).astimezone(UTC).timestamp() < 0.0010001


@given(st.text(), st.text())
def test_whatever_a_client_writes_makes_one_short_line(tmp_path_factory, model, path):
    where = tmp_path_factory.mktemp("log") / "log"
    log = RequestLog(str(where))
    entry = Record("id", "POST", path * 50, model=model * 50)
    log.write(entry, BEGAN)
    log._closing.set()  # at once: this is not about the timer
    log.close()
    raw = where.read_bytes()
    assert raw.count(b"\n") == 1
    assert len(raw) < 2500
    assert json.loads(raw)["model"] == (model * 50)[:128]


def test_lines_come_by_themselves_soon(tmp_path):
    log = RequestLog(str(tmp_path / "log"))
    began = time.monotonic()
    log.write(record(), BEGAN)
    until(lambda: lines(tmp_path / "log"))
    assert time.monotonic() - began < 2
    log.close()


def test_no_log_is_no_thread_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RequestLog(None)
    log.write(record(), BEGAN)
    log.reopen()
    log.close()
    assert log.dropped == 0
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_made_fails_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        RequestLog(str(tmp_path / "missing" / "log"))


def test_reopen_goes_on_in_a_new_file(tmp_path):
    path, moved = tmp_path / "log", tmp_path / "log.1"
    log = RequestLog(str(path))
    log.write(record(status=1), BEGAN)
    until(lambda: path.read_bytes())
    path.rename(moved)
    log.reopen()
    until(path.exists)
    log.write(record(status=2), BEGAN)
    log.close()
    assert [line["status"] for line in lines(moved)] == [1]
    assert [line["status"] for line in lines(path)] == [2]


def test_a_reopen_that_fails_keeps_the_old_file(tmp_path, caplog):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = RequestLog(str(folder / "log"))
    folder.rename(tmp_path / "away")
    log.reopen()
    until(lambda: told(caplog))
    log.write(record(), BEGAN)
    log.close()
    assert len(lines(tmp_path / "away" / "log")) == 1


def test_two_writers_of_one_file_mix_whole_lines(tmp_path):
    path = tmp_path / "log"
    logs = [RequestLog(str(path)) for _ in range(2)]
    for number in range(4000):
        logs[number % 2].write(record(status=number), BEGAN)
    for log in logs:
        log.close()
    assert sorted(line["status"] for line in lines(path)) == list(range(4000))


@pytest.fixture
def pipe(tmp_path):
    """A named pipe and the end that should be read."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", 0) as reader:
        yield path, reader


def drained(reader, stop):
    """All that comes until `stop` says so."""
    data = b""
    while True:
        done = stop()
        while chunk := reader.read(65536):
            data += chunk
        if done:
            return data
        time.sleep(0.005)


def told(caplog):
    """How many lines the gateway wrote for its administrator."""
    return sum(record.name == "inferfleet.gateway" for record in caplog.records)


def test_a_reader_that_stalls_stops_nothing_and_loses_only_what_is_over_the_bound(pipe):
    path, reader = pipe
    log = RequestLog(str(path), most_waiting=500)
    began = time.monotonic()
    for number in range(20_000):
        log.write(record(status=number), BEGAN)
    assert time.monotonic() - began < 5
    assert log.dropped > 15_000

    data = drained(reader, lambda: not log._lines)
    log.write(record(status=20_000), BEGAN)
    log.close()
    data += drained(reader, lambda: True)
    found = [json.loads(line)["status"] for line in data.splitlines()]
    assert len(found) == 20_001 - log.dropped
    assert found == sorted(found)
    assert found[-1] == 20_000


def test_close_gives_a_stalled_reader_up(pipe):
    path, reader = pipe
    log = RequestLog(str(path))
    for _ in range(2000):
        log.write(record(), BEGAN)
    thread = log._thread
    began = time.monotonic()
    log.close(timeout=0.3)
    assert 0.3 <= time.monotonic() - began < 2
    drained(reader, lambda: not thread.is_alive())


def test_a_reader_that_left_costs_lines_not_requests(pipe, caplog):
    path, reader = pipe
    log = RequestLog(str(path))
    reader.close()
    for count in (1, 2, 3):
        log.write(record(), BEGAN)
        until(lambda: log.dropped == count)  # noqa: B023 - asked at once
    log.close()
    assert told(caplog) == 1


def test_a_full_disk_is_counted_and_told_once(caplog):
    log = RequestLog("/dev/full")
    log.write(record(), BEGAN)
    until(lambda: log.dropped == 1)
    log.write(record(), BEGAN)
    log.close()
    assert log.dropped == 2
    assert told(caplog) == 1


CHILD = """
import os, sys
from inferfleet.gateway.log import Record, RequestLog
os.set_blocking(1, sys.argv[1] == "blocking")
log = RequestLog("-")
for number in range(3000):
    log.write(Record("id", "GET", "/", status=number), 0.0)
log.close(timeout=20)
print(log.dropped, file=sys.stderr)
"""


@pytest.mark.parametrize("mode", ["blocking", "non-blocking"])
def test_standard_output_is_written_to_its_last_line(mode):
    argv = [sys.executable, "-c", CHILD, mode]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == "0\n"
    found = [json.loads(line)["status"] for line in done.stdout.splitlines()]
    assert found == list(range(3000))


@pytest.mark.parametrize("given_id", [b"a", b"req_1.2-Z", b"x" * 128])
def test_a_fit_id_of_the_client_is_kept(given_id):
    assert RequestIds().take(given_id) == given_id.decode()


@pytest.mark.parametrize(
    "given_id", [b"", b"x" * 129, b"a b", b"a\n", b"\n", b'"', b"\xc3\xa9", b"a/../b", b"a\x00"]
)
def test_an_unfit_id_is_replaced(given_id):
    assert re.fullmatch("[0-9a-f]{16}", RequestIds().take(given_id))


def test_made_ids_differ_also_between_processes():
    sources = [RequestIds() for _ in range(10)]
    made = [ids.take() for ids in sources for _ in range(1000)]
    assert len(set(made)) == len(made)
