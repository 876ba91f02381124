"""Load: what is sent, how streams are read, exact statistics, comparisons, and the command."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import make
import pytest
from hypothesis import given
from hypothesis import strategies as st
from invoke.context import Context
from invoke.exceptions import Exit
from rich.console import Console

from inferfleet.cli import namespace
from inferfleet.errors import Error, UsageError
from inferfleet.load import bench, compare, page, plot, report, saved, steps, target
from inferfleet.load.client import Client
from inferfleet.load.outcome import outcome, side
from inferfleet.load.statistics import (
    Rates,
    Round,
    Sample,
    Step,
    percentile,
    rates,
    step,
    summary,
    tokens_within,
    within,
)
from inferfleet.load.stream import Reader
from inferfleet.load.target import Target
from inferfleet.load.workload import Method, Prompts, Workload, body

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "roles/simulator/simulator.py"
RATE = 200  # tokens a second: 5 ms each
WORK = Workload(prompt_tokens=64, output_tokens=24, ignore_eos=True, words=64)


class Simulator:
    """A running simulator on a free loopback port."""

    def __init__(self, rate: float = RATE, key: str = "") -> None:
        argv = [sys.executable, str(PROGRAM), "--port", "0", "--served-model-name", "tiny"]
        self.process = subprocess.Popen(
            [*argv, "--token-rate", str(rate)],
            env={**os.environ, "VLLM_API_KEY": key},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.target = Target("simulator", self.url, "tiny", key=key)

    def fault(self, fault: str | None) -> None:
        data = None if fault is None else json.dumps({"fault": fault}).encode()
        asked = urllib.request.Request(
            f"{self.url}/simulator/faults",
            data,
            {"content-type": "application/json"},
            method="POST" if data else "DELETE",
        )
        urllib.request.urlopen(asked, timeout=10).close()

    def finished(self) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = re.findall(
                r"^vllm:request_success_total.* (\S+)$", response.read().decode(), re.M
            )
        return sum(map(float, lines))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def running():
    simulator = Simulator()
    yield simulator
    simulator.stop()


@pytest.fixture
def simulator(running):
    yield running
    running.fault(None)


@pytest.fixture(scope="module")
def slow():
    simulator = Simulator(RATE / 2)
    yield simulator
    simulator.stop()


def measured(*targets, watch=lambda _: None, **method):
    """A run's steps, by target."""
    run = steps.measure(list(targets), Method(WORK, **method), watch)
    return run, [side(each, n, run.rounds) for n, each in enumerate(run.targets)]


def asked(where: Target, *contents: bytes, timeout: float = 10.0) -> list[Sample]:
    """What single requests came to."""

    async def ask():
        client = Client(where, timeout)
        try:
            return [await client.ask(content) for content in contents]
        finally:
            await client.close()

    return asyncio.run(ask())


def request(**more):
    workload = Workload(output_tokens=8, ignore_eos=True)
    return json.dumps(json.loads(body("openai", "tiny", "Hello", workload)) | more).encode()


# prompts


def test_prompts_differ_from_the_first_word_on_and_have_their_length():
    prompts = Prompts(Workload(words=100), "run")
    made = [prompts.next() for _ in range(200)]
    assert len({prompt.split()[0] for prompt in made}) == 200
    assert len({tuple(prompt.split()[1:101]) for prompt in made}) > 20
    assert {len(prompt.split(": ", 1)[1].split("\n")[0].split()) for prompt in made} == {100}


def test_a_shared_beginning_is_the_same_in_all_and_across_runs():
    workload = Workload(words=100, shared_prefix=40)
    one, other = Prompts(workload, "a").next(), Prompts(workload, "b").next()
    assert one.split()[:40] == other.split()[:40]
    assert one.split()[40] != other.split()[40]


@given(st.integers(16, 4000), st.integers(64, 4000), st.floats(0.7, 3), st.integers(0, 200))
def test_prompts_are_fitted_to_the_wanted_length(wanted, words, each, template):
    """Whatever the tokens of a word, and those that the template adds."""
    workload = Workload(prompt_tokens=wanted, words=words)
    counts = [(w, round(each * w + template)) for w in (words // 4, words // 8)]
    fitted = workload.calibrated(*counts)
    made = counts[0][1] + each * (fitted.words - words // 4)  # by the true length of a word
    off = abs(fitted.words - words // 4) / (words // 4 - words // 8)  # of a rounded count
    if fitted.words > 1:
        assert abs(made - wanted) <= each + off + 1
    assert fitted.words >= 1


@pytest.mark.parametrize("least", [None, 40])
def test_prompts_keep_their_words_where_counts_say_nothing(least):
    assert WORK.calibrated((16, 40), (8, least)) == WORK


# streams


def sse(*events):
    return b"".join(b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n"
                    for e in events)  # fmt: skip


def delta(finish=None, **said):
    return {"choices": [{"delta": said, "finish_reason": finish}]}


STREAM = b": alive\r\n\r\n" + sse(
    delta(role="assistant", content=""),
    delta(content="One"),
    delta(reasoning_content="hm"),
    delta(tool_calls=[{"index": 0}]),
    delta("stop", content=""),
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}},
    b"[DONE]",
)
LINES = b"".join(
    json.dumps(line).encode() + b"\n"
    for line in (
        {"message": {"role": "assistant", "content": "One"}, "done": False},
        {"message": {"content": "", "thinking": "hm"}, "done": False},
        {"message": {"content": ""}, "done": True, "eval_count": 5, "prompt_eval_count": 7},
    )
)


@given(st.sampled_from([("openai", STREAM, 3), ("ollama", LINES, 2)]), st.data())
def test_a_stream_is_read_the_same_however_it_is_cut(case, data):
    api, stream, chunks = case
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = Reader(api)
    found = sum(
        reader.feed(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    )
    assert (found, reader.whole, reader.error) == (chunks, True, "")
    assert (reader.tokens, reader.prompt_tokens) == (5, 7)


def test_an_error_inside_a_stream_is_one():
    reader = Reader("openai")
    assert reader.feed(sse(delta(content="One"), {"error": {"message": "out of memory"}})) == 1
    assert (reader.error, reader.whole) == ("out of memory", False)
    reader = Reader("ollama")
    reader.feed(b'{"error": "model failed"}\n')
    assert reader.error == "model failed"


# statistics

SECONDS = st.floats(0, 1000, allow_nan=False)


@given(st.lists(SECONDS, min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values, percent):
    enough = [v for v in values if 100 * sum(w <= v for w in values) >= percent * len(values)]
    assert percentile(sorted(values), percent) == min(enough)


@given(st.lists(SECONDS))
def test_a_summary_is_in_order(values):
    found = summary(values)
    if found is None:
        assert not values
        return
    assert found.count == len(values)
    ordered = [found.low, found.p50, found.p95, found.p99, found.high]
    assert ordered == sorted(ordered)
    assert set(ordered) <= set(values)
    assert min(values) - 1e-9 <= found.mean <= max(values) + 1e-9


@st.composite
def samples(draw):
    begun = draw(st.floats(-50, 50))
    gaps = draw(st.lists(st.floats(0.001, 5), min_size=1, max_size=20))
    arrivals = [begun + sum(gaps[: n + 1]) for n in range(len(gaps))]
    ended = arrivals[-1] + draw(st.floats(0, 5))
    return Sample(begun, ended, arrivals, draw(st.integers(1, 60)))


@given(st.lists(samples(), min_size=1, max_size=10), st.floats(-60, 60), st.floats(0.1, 200))
def test_rates_count_only_what_is_in_the_window(found, begun, seconds):
    window = Round(0, 1, begun, begun + seconds, found, whole=True)
    for sample in found:
        assert 0 <= within(sample, window) <= 1
        assert 0 <= tokens_within(sample, window) <= sample.tokens
    whole = Round(0, 1, -1000, 1000, found, whole=True)
    assert rates([whole]).requests_per_second == pytest.approx(len(found) / 2000)
    tokens = sum(sample.tokens for sample in found)
    assert rates([whole]).output_tokens_per_second == pytest.approx(tokens / 2000)


def test_a_steady_load_has_its_true_rate_whatever_the_window_cuts():
    """Two clients with requests of 3 s, in a window of 10: 2/3 a second, though only six ended."""
    found = [Sample(s, s + 3, [s + 1, s + 2, s + 3], 3) for s in (0, 3, 6, 9)] * 2
    window = Round(0, 2, 0, 10, found, whole=True)
    assert rates([window]).requests_per_second == pytest.approx(2 / 3)


def test_latencies_of_one_request():
    sample = Sample(10.0, 13.0, [11.0, 11.5, 12.0, 13.0], tokens=9)
    assert sample.first_token == 1.0
    assert sample.per_token == 0.25  # 2 s for the eight tokens after the first
    found = step([Round(0, 1, 10.0, 13.0, [sample], whole=True)])
    assert found.gap is not None
    assert (found.gap.count, found.gap.p50, found.gap.high) == (3, 0.5, 1.0)
    assert Sample(0, 1, [1.0], 1).per_token is None


# comparisons


@given(st.lists(SECONDS, max_size=6), st.lists(SECONDS, max_size=6))
def test_a_verdict_turns_round_with_its_sides(first, second):
    turned = {"higher": "lower", "lower": "higher"}
    said = compare.verdict(first, second)
    assert compare.verdict(second, first) == turned.get(said, said)
    if said == "higher":
        assert all(b > a for a in first for b in second)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([1, 2, 3], [4, 5, 6], "higher"),
        ([4, 5, 6], [1, 2, 3], "lower"),
        ([1, 2, 5], [4, 6, 7], "within noise"),
        ([1, 2], [4, 5, 6], "unknown"),
    ],
)
def test_verdicts(first, second, said):
    assert compare.verdict(first, second) == said


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


# targets

FLEET = """\
groups: {all: {user: deploy}}
hosts:
  edge: {address: 192.0.2.1}
  gpu: {address: 192.0.2.2, private_address: 192.0.2.3, gpus: [{model: L40S, count: 2}]}
models:
  small: {repository: example/small, revision: 8e8ed243bbe6f9a5aff549a0924562fc719b2b8a,
          served_name: little}
  large: {repository: example/large, revision: 8e8ed243bbe6f9a5aff549a0924562fc719b2b8a}
deployments:
  a: {engine: simulator, model: small, hosts: [gpu], port: 8000, api_key: !env ENGINE_KEY}
  b: {engine: simulator, model: large, hosts: [gpu], port: 8100, api_key: !env ENGINE_KEY}
phases:
  one: &one
    users: 1
    why: w
    hosts: [edge, gpu]
    deployments: [a]
    roles: &roles
      balancer:
        hosts: [edge]
        server_name: llm.example.com
        api_keys: {web: !env WEB_KEY, team: !env TEAM_KEY}
        tls: {certificate: !file tls.crt, key: !file tls.key}
  two: {users: 1, why: w, hosts: [edge, gpu], deployments: [a, b], roles: *roles}
  bare: {users: 1, why: w, hosts: [gpu], deployments: [a]}
  gated:
    users: 1
    why: w
    hosts: [edge, gpu]
    deployments: [a, b]
    roles:
      balancer:
        hosts: [edge]
        server_name: llm.example.com
        tls: {certificate: !file tls.crt, key: !file tls.key}
      gateway:
        hosts: [gpu]
        api_keys: {web: {key: !env WEB_KEY, concurrency: 4}}
  joined:
    users: 1
    why: w
    hosts: [gpu]
    deployments: [a, b]
    roles:
      gateway:
        hosts: [gpu]
        listen: public
        api_keys: {web: !env WEB_KEY}
        models: {little: {aliases: [large]}}
"""


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    project = make.project(tmp_path, fleet=FLEET)
    (project.folder / "tls.crt").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    for name in ("WEB", "TEAM", "ENGINE"):
        monkeypatch.setenv(f"{name}_KEY", f"{name.lower()}-value")
    return project


def test_a_phase_is_reached_through_its_balancer_with_a_clients_key(fleet):
    found = target.of_phase(fleet, fleet.plan("one"), "", "web", "")
    assert (found.url, found.model, found.api) == ("https://192.0.2.1", "little", "openai")
    assert (found.user, found.key, found.server_name) == ("web", "web-value", "llm.example.com")
    assert found.pinned.startswith("-----BEGIN")
    assert "web-value" not in repr(found)
    first = target.of_phase(fleet, fleet.plan("one"), "", "", "ca.pem")
    assert (first.user, first.key, first.pinned) == ("team", "team-value", "")


def test_of_several_deployments_each_has_its_path(fleet):
    found = target.of_phase(fleet, fleet.plan("two"), "large", "", "")
    assert (found.url, found.model) == ("https://192.0.2.1/b", "large")
    with pytest.raises(UsageError, match="which model"):
        target.of_phase(fleet, fleet.plan("two"), "", "", "")
    with pytest.raises(UsageError, match="did you mean large"):
        target.of_phase(fleet, fleet.plan("two"), "larg", "", "")


def test_a_gateway_holds_the_keys_and_knows_every_model(fleet):
    plan = fleet.plan("gated")
    found = target.of_phase(fleet, plan, "other-name", "web", "")
    assert (found.url, found.model) == ("https://192.0.2.1", "other-name")
    assert (found.user, found.key) == ("web", "web-value")
    with pytest.raises(UsageError, match=r"it has web$"):
        target.of_phase(fleet, plan, "large", "team", "")
    found = target.of_phase(fleet, fleet.plan("joined"), "", "", "")
    assert (found.url, found.model) == ("http://192.0.2.2:8080", "little")


def test_what_a_phase_has_not_is_told(fleet):
    with pytest.raises(UsageError, match=r"no user 'wbe' \(did you mean web\?\); it has team, web"):
        target.of_phase(fleet, fleet.plan("one"), "", "wbe", "")
    with pytest.raises(Error, match=r"ssh -N -L 8000:127[.]0[.]0[.]1:8000 gpu"):
        target.of_phase(fleet, fleet.plan("bare"), "", "", "")


def test_an_ollama_on_this_machine_is_asked_in_its_own_api():
    place = bench.Place("local")
    found = place.target(ROOT / "inventory", rehearse=False)
    assert (found.url, found.api) == ("http://127.0.0.1:11434", "ollama")
    assert place.target(ROOT / "inventory", rehearse=True).api == "openai"


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("ftp://x", "", "--url is http"),
        ("http://name:word@x", "", "no password belongs into it"),
        ("http://x", "sk-secret", "never the key itself"),
    ],
)
def test_urls_and_keys_are_checked(url, key, said):
    with pytest.raises(UsageError, match=said) as told:
        target.of_url(url, "", "openai", key, "")
    assert "sk-secret" not in str(told.value)
    assert "word" not in str(told.value).replace("password", "")


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


# the command

COMMAND = [sys.executable, "-W", "error", "-m", "inferfleet"]


def run(folder, *words, command=COMMAND, **environment):
    return subprocess.run(
        [*command, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


URL = "http://127.0.0.1:1"
SHORT = ("--output-tokens", "8", "--prompt-tokens", "64", "--ignore-eos")


def test_the_whole_command(simulator, tmp_path):
    words = ("--url", simulator.url, *SHORT, "--concurrency", "1,2", "--requests", "4")
    done = run(tmp_path, "bench", *words, "--html", "r.html", "--svg", "r.svg")
    assert done.returncode == 0, done
    assert "1, 2 requests at once, 4 requests each" in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["1", "4", "0"], ["2", "4", "0"]]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.svg").read_text().startswith("<svg")


def test_before_against_after(simulator, tmp_path):
    words = ("bench", "--url", simulator.url, *SHORT, "--concurrency", "1", "--requests", "2",
             "--repeats", "3", "--json")  # fmt: skip
    first = run(tmp_path, *words)
    found = json.loads(first.stdout)
    assert (first.returncode, first.stderr, found["ok"]) == (0, "", True)
    (tmp_path / "before.json").write_text(first.stdout)
    after = json.loads(run(tmp_path, *words, "--before", "before.json").stdout)
    assert [each["name"] for each in after["targets"]] == [
        f"before: {simulator.url}",
        simulator.url,
    ]
    assert (after["interleaved"], after["interrupted"]) == (False, False)
    assert {each["metric"] for each in after["ratios"]} == {m.name for m in compare.METRICS}
    assert any("not measured in turns" in line for line in after["warnings"])
    assert after["method"]["workload"]["prompt_tokens"] == 64


def test_a_key_that_is_refused_is_one_clear_line(tmp_path):
    simulator = Simulator(key="right")
    try:
        words = ("bench", "--url", simulator.url, "--key", "env:THE_KEY", *SHORT,
                 "--concurrency", "1", "--requests", "1")  # fmt: skip
        refused = run(tmp_path, *words, THE_KEY="sk-wrong")
        allowed = run(tmp_path, *words, THE_KEY="right")
    finally:
        simulator.stop()
    assert refused.returncode == 1
    last = refused.stderr.splitlines()[-1]
    assert last == f"{simulator.url} refuses the key of env:THE_KEY (status 401)"
    assert "sk-wrong" not in refused.stdout + refused.stderr
    assert allowed.returncode == 0, allowed
    assert "right" not in allowed.stdout + allowed.stderr


def test_a_target_that_is_down_is_one_clear_line(tmp_path):
    done = run(tmp_path, "bench", "--url", "http://127.0.0.1:1", "--json")
    (problem,) = json.loads(done.stdout)["problems"]
    assert done.returncode == 1
    assert problem["message"].startswith("http://127.0.0.1:1 cannot be reached: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "say either --phase or --url"),
        ({"url": URL, "phase": "pilot"}, "say either"),
        ({"phase": "pilot", "concurrency": "1,257"}, "256 requests at once at most"),
        ({"url": URL, "against": "pilot", "concurrency": "300"}, "256 requests"),
        ({"url": URL, "concurrency": "few"}, "is a whole number, not 'few'"),
        ({"url": URL, "concurrency": ","}, "--concurrency is whole numbers"),
        ({"url": URL, "api": "grpc"}, "--api is one of openai, ollama"),
        ({"url": URL, "user": "web"}, "--user is of a phase"),
        ({"phase": "local", "key": "env:X"}, "--key and --api are of a URL"),
        ({"url": URL, "seconds": "1", "requests": "1"}, "exclude each other"),
        ({"url": URL, "shared_prefix": "512"}, "leaves nothing of a prompt"),
        ({"url": URL, "against": URL, "before": "z"}, "exclude each other"),
    ],
)
def test_wrong_usage(words, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Exit) as told:
        namespace["bench"](Context(), **words)
    shown = capsys.readouterr()
    assert (told.value.code, shown.out) == (2, "")
    assert said in shown.err


def test_without_the_extra_it_says_which(tmp_path):
    script = "import sys; sys.modules['uvloop'] = None; from inferfleet.cli import main; main()"
    done = run(tmp_path, "bench", "--url", "http://x", command=[sys.executable, "-c", script])
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "bench needs uvloop, which is not here: pip install 'inferfleet[bench]'"
    )


def test_interrupted_it_reports_what_was_measured(simulator, tmp_path):
    words = ("bench", "--url", simulator.url, *SHORT, "--concurrency", "1,2", "--json")
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    end = time.monotonic() + 30
    wanted = simulator.finished() + 8
    while simulator.finished() < wanted:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    told, wrong = process.communicate(timeout=10)
    assert (process.returncode, wrong) == (130, "")
    found = json.loads(told)
    (only,) = found["targets"][0]["steps"]
    assert found["interrupted"]
    assert not only["complete"]
    assert (only["requests"] >= 3, only["errors"]) == (True, {})
