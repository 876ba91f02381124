"""Load: what is sent, how streams are read, exact statistics, comparisons, targets."""

from __future__ import annotations

import json
from pathlib import Path

import make
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loadkit import WORK

from inferfleet.errors import Error, UsageError
from inferfleet.load import bench, compare, target
from inferfleet.load.statistics import (
    Round,
    Sample,
    percentile,
    rates,
    step,
    summary,
    tokens_within,
    within,
)
from inferfleet.load.stream import Reader
from inferfleet.load.workload import Prompts, Workload

ROOT = Path(__file__).parent.parent

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
