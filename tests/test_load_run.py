"""Load against the simulator and other servers: delays, errors, results as pages and plots."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import ssl
import subprocess
import threading
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import loadkit
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loadkit import RATE, WORK, asked, measured, request
from rich.console import Console

from inferfleet.errors import Error, UsageError
from inferfleet.load import bench, compare, page, plot, report, saved
from inferfleet.load.client import Client
from inferfleet.load.outcome import outcome, side
from inferfleet.load.statistics import Rates, Round, Sample, Step
from inferfleet.load.target import Target
from inferfleet.load.workload import Method

running, simulator, slow = loadkit.running, loadkit.simulator, loadkit.slow

# against the simulator


def test_known_delays_are_measured(simulator):
    """Lower bounds are exact, as nothing comes early; upper ones allow for a busy machine."""
    simulator.fault("slow-first-token=0.05")
    _, (found,) = measured(simulator.target, concurrency=(1, 4), seconds=0.6)
    assert [each.concurrency for each in found.steps] == [1, 4]
    for each in found.steps:
        assert (each.errors, each.complete, each.counted_chunks) == ({}, True, False)
        assert each.output_tokens == WORK.output_tokens
        assert each.requests >= each.concurrency
        first, between = each.rates.first_token, each.rates.inter_token
        assert first is not None
        assert between is not None
        assert first.low >= 0.05
        assert first.p50 < 0.3
        assert 0.004 <= between.p50 < 0.02  # the token after the late one comes at once
        assert 0 < each.rates.output_tokens_per_second <= 1.1 * each.concurrency * RATE
        assert 0 < each.client_cpu < 2


def test_prompts_have_their_length_in_the_servers_tokens(simulator):
    _, (found,) = measured(simulator.target, concurrency=(1,), requests=5)
    assert found.steps[0].requests == 5
    assert found.steps[0].prompt_tokens == pytest.approx(WORK.prompt_tokens, abs=4)


def test_the_model_is_found_where_there_is_one(simulator):
    run, _ = measured(Target("x", simulator.url), concurrency=(1,), requests=1)
    assert run.targets[0].model == "tiny"


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("status=503", "status 503", "told to fail"),
        ("reset", "reset", ""),
        ("cut-after=3", "cut", ""),
        ("hang", "timeout", ""),
    ],
)
def test_errors_by_kind(simulator, fault, kind, said):
    simulator.fault(fault)
    (sample,) = asked(simulator.target, request(), timeout=0.3)
    assert sample.error == kind
    assert said in sample.detail
    assert sample.detail


def test_failures_count_apart_and_are_not_hammered(simulator):
    """The fault comes in the second step; a client that is refused at once waits."""

    def watch(now):
        if now and now.concurrency == 2:
            simulator.fault("status=503")

    _, (found,) = measured(simulator.target, watch=watch, concurrency=(1, 2), seconds=1.0)
    first, second = found.steps
    assert first.errors == {}
    assert set(second.errors) == {"status 503"}
    assert second.requests <= 20


def test_a_target_that_stops_answering_is_left_alone(simulator, monkeypatch):
    async def answered(*_):
        return Sample(0)

    monkeypatch.setattr(Client, "probe", answered)
    simulator.fault("status=503")
    run, (found,) = measured(simulator.target, concurrency=(1, 2), requests=2)
    assert [each.concurrency for each in found.steps] == [1]
    told = outcome(run.method, [found], interrupted=False)
    assert any("no request was answered" in line for line in told.warnings)
    assert not bench.fine(told)


@pytest.fixture(scope="module")
def compared(running, slow):
    """Two targets in turns, one at half the speed of the other."""
    other = Target("slow", slow.url, "tiny")
    run, sides = measured(running.target, other, concurrency=(1, 2), seconds=0.3, repeats=3)
    return run, outcome(run.method, sides, interrupted=False)


def test_two_targets_are_measured_in_turns(compared):
    run, found = compared
    order = [(each.concurrency, each.target) for each in run.rounds]
    assert order == [(1, 0), (1, 1)] * 3 + [(2, 0), (2, 1)] * 3
    assert found.interleaved
    for each in found.ratios:
        if each.metric == "inter_token_p50":
            assert each.verdict == "higher"
            assert 1.5 < each.ratio < 2.5
        if each.metric == "output_tokens_per_second":
            assert each.verdict == "lower"
    assert {each.concurrency for each in found.ratios} == {1, 2}


# results


def test_a_saved_result_reads_back_the_same(compared, tmp_path):
    _, found = compared
    path = tmp_path / "run.json"
    path.write_text(json.dumps(saved.document(found, ok=True), sort_keys=True))
    method, last = saved.load(path)
    assert method == found.method
    assert last == found.sides[1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 9}'])
def test_what_is_no_saved_result_is_refused(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run\.json"):
        saved.load(path)


class Balanced(HTMLParser):
    """Every element is closed, in order; nothing is loaded from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        assert not {name for name, _ in attrs} & {"src", "href"}
        self.seen.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(compared):
    _, found = compared
    text = page.html(found)
    reader = Balanced()
    reader.feed(text)
    assert reader.open == []
    assert reader.seen.count("svg") == 1
    assert reader.seen.count("tr") == 1 + 2 * 3
    assert "url(" not in text
    assert "@import" not in text


def test_the_plot_is_an_image_with_every_step(compared):
    _, found = compared
    image = ET.fromstring(plot.svg(found))
    titles = [each.text for each in image.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 2 * len(compare.METRICS)
    box = [float(part) for part in image.attrib["viewBox"].split()]
    for dot in image.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(dot.attrib["cx"]) < box[2]
        assert 0 < float(dot.attrib["cy"]) < box[3]


def test_names_are_quoted_in_pages_and_plots():
    nothing = Step(1, 1, {"cut": 1}, Rates(0, 0, None, None), None, None, None, 0, False, 0, 0,
                   True, ())  # fmt: skip
    sides = [side(Target("<b>&", "http://x", "<i>"), 0, [])]
    sides[0] = type(sides[0])("<b>&", "http://x", "<i>", "openai", "", (nothing,), {"cut": "<u>"})
    found = outcome(Method(), sides, interrupted=False)
    for text in (page.html(found), plot.svg(found)):
        assert not re.search("<[biu]>", text)
    ET.fromstring(plot.svg(found))


@given(st.floats(0.001, 1e6))
def test_an_axis_ends_above_its_values_at_a_round_number(value):
    end = plot.ceiling(value)
    assert value * 0.999 <= end <= value * 2.5
    assert float(f"{end:.0e}") == pytest.approx(end)


def test_a_terminal_sees_how_far_it_is_and_a_file_nothing():
    found = Round(0, 4, 100.0, samples=[Sample(0, 1, [1], 1), Sample(0, 1, error="cut")])
    for terminal, said in ((True, "little at 4: 1 answer, 1 failed, 15 s left"), (False, "")):
        out = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with report.Progress(out, [Target("little", "http://x")], Method()) as progress:
            progress.show(found, 105.0)
        assert said in out.file.getvalue()
        assert bool(out.file.getvalue()) == terminal


# other servers


@contextlib.contextmanager
def tls(folder: Path, port: int):
    """TLS in front of a port, with a certificate made for it: its URL, and the certificate."""
    certificate, key = folder / "crt.pem", folder / "key.pem"
    name = "llm.example.com"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    made += ["-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"]
    argv = ["openssl", *made, "-keyout", key, "-out", certificate]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trust.load_cert_chain(certificate, key)
    loop = asyncio.new_event_loop()

    async def pipe(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader, writer):
        behind = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, behind[1]), pipe(behind[0], writer))

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, ssl=trust))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", certificate.read_text()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        server.close()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


def test_a_phases_certificate_must_be_the_very_one(simulator, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    with tls(tmp_path, simulator.port) as (url, own), tls(other, simulator.port) as (_, alien):
        (sample,) = asked(Target("t", url, "tiny", pinned=own), request())
        assert (sample.error, sample.tokens) == ("", 8)
        with pytest.raises(Error, match="certificate is not trusted"):
            measured(Target("t", url, "tiny", pinned=alien), concurrency=(1,), requests=1)


def test_an_authority_vouches_for_the_name(simulator, tmp_path):
    with tls(tmp_path, simulator.port) as (url, _):
        ca = str(tmp_path / "crt.pem")
        named = Target("t", url, "tiny", ca=ca, server_name="llm.example.com")
        (sample,) = asked(named, request())
        assert sample.error == ""
        (sample,) = asked(Target("t", url, "tiny", ca=ca), request())
        assert sample.error == "TLS"


class Ollama(BaseHTTPRequestHandler):
    """Ollama's native API, as far as a chat needs it."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer([{"models": [{"name": "little:1b"}]}])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/api/chat"
        assert (body["model"], body["stream"]) == ("little:1b", True)
        made = body["options"]["num_predict"]
        words = [{"message": {"role": "assistant", "content": "x"}, "done": False}] * made
        asked = len(body["messages"][0]["content"].split())
        self._answer([*words, {"done": True, "eval_count": made, "prompt_eval_count": asked}])

    def _answer(self, lines):
        self.send_response(200)
        self.end_headers()
        for line in lines:
            self.wfile.write(json.dumps(line).encode() + b"\n")
            self.wfile.flush()
            time.sleep(0.002)


def test_ollamas_own_api():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ollama)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        run, (found,) = measured(Target("o", url, api="ollama"), concurrency=(2,), requests=6)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert run.targets[0].model == "little:1b"
    each = found.steps[0]
    assert (each.requests, each.errors, each.output_tokens) == (6, {}, WORK.output_tokens)
    assert each.prompt_tokens == pytest.approx(WORK.prompt_tokens, abs=2)
    assert each.rates.inter_token is not None
    assert each.rates.inter_token.low >= 0.0015
