"""Metrics: the numbers as Prometheus reads them."""

import subprocess

from hypothesis import given
from hypothesis import strategies as st
from monitoringkit import programs
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as LibraryHistogram
from prometheus_client.parser import text_string_to_metric_families

from inferfleet.gateway.metrics import CONTENT_TYPE, Histogram, Metrics


def read(metrics):
    """Every sample of a scrape: (name without our prefix, labels) to its value."""
    families = text_string_to_metric_families(metrics.expose().decode())
    samples = [sample for family in families for sample in family.samples]
    found = {
        (s.name.removeprefix("inferfleet_gateway_"), tuple(sorted(s.labels.items()))): s.value
        for s in samples
    }
    assert len(found) == len(samples)
    return found


def value(found, name, **labels):
    return found[name, tuple(sorted(labels.items()))]


def busy():
    """One of everything, each with a number of its own."""
    metrics = Metrics(["coder", "chat"], log_dropped=lambda: 17)
    where = metrics.of("coder", "gpu", "gpu-0")
    where.codes[200] += 5
    where.codes[502] += 1
    where.seconds.observe(1.5)
    where.first_token.observe(0.2)
    where.inter_chunk.observe(0.02)
    where.cut += 2
    where.client_left += 3
    metrics.of("coder", "gpu", "gpu-1").seconds.observe(2.5)
    model = metrics.model("coder")
    model.prompt_tokens += 700
    model.completion_tokens += 80
    model.queued += 4
    instance = metrics.instance("gpu-0")
    instance.outstanding += 6
    instance.ejections["hung"] += 1
    metrics.instance("gpu-1").up = False
    metrics.refused["rate"] += 8
    metrics.retries["connect"] += 9
    shadow = metrics.shadow("coder", "old")
    shadow.outcomes["answered"] += 10
    shadow.seconds.observe(0.7)
    return metrics


def test_a_scrape_says_what_was_counted():
    found = read(busy())
    where = {"model": "coder", "pool": "gpu", "instance": "gpu-0"}
    pool = {"model": "coder", "pool": "gpu"}
    assert value(found, "requests_total", code="200", **where) == 5
    assert value(found, "requests_total", code="502", **where) == 1
    assert value(found, "streams_cut_total", **where) == 2
    assert value(found, "client_left_total", **where) == 3
    assert value(found, "first_token_seconds_bucket", le="0.1", **where) == 0
    assert value(found, "first_token_seconds_bucket", le="0.25", **where) == 1
    assert value(found, "first_token_seconds_sum", **where) == 0.2
    assert value(found, "request_seconds_count", **pool) == 2
    assert value(found, "request_seconds_sum", **pool) == 4
    assert value(found, "inter_chunk_seconds_bucket", le="+Inf", **pool) == 1
    assert value(found, "tokens_total", model="coder", kind="prompt") == 700
    assert value(found, "tokens_total", model="coder", kind="completion") == 80
    assert value(found, "queued", model="coder") == 4
    assert value(found, "outstanding", instance="gpu-0") == 6
    assert value(found, "instance_up", instance="gpu-0") == 1
    assert value(found, "instance_up", instance="gpu-1") == 0
    assert value(found, "ejections_total", instance="gpu-0", reason="hung") == 1
    assert value(found, "ejections_total", instance="gpu-1", reason="passive") == 0
    assert value(found, "retries_total", reason="connect") == 9
    assert value(found, "log_dropped_total") == 17
    shadow = {"model": "coder", "pool": "old"}
    assert value(found, "shadow_requests_total", outcome="answered", **shadow) == 10
    assert value(found, "shadow_seconds_sum", **shadow) == 0.7


def test_every_reason_to_refuse_is_there_from_the_beginning():
    found = read(Metrics([]))
    reasons = {dict(labels)["reason"] for name, labels in found if name == "refused_total"}
    assert reasons == {
        "key", "model", "rate", "concurrency", "budget", "queue", "body",
    }  # fmt: skip


def test_the_process_itself_is_seen():
    found = read(Metrics([]))
    assert value(found, "process_resident_memory_bytes") > 1e6
    assert 0 < value(found, "process_open_fds") <= 1_000_000


def test_the_same_names_give_the_same_object():
    metrics = Metrics(["a", "b"])
    assert metrics.of("a", "p", "i") is metrics.of("a", "p", "i")
    assert metrics.of("a", "p", "i") is not metrics.of("b", "p", "i")
    assert metrics.of("a", "p", "i").seconds is metrics.of("a", "p", "j").seconds
    assert metrics.of("a", "p", "i").first_token is not metrics.of("a", "p", "j").first_token
    assert metrics.model("a") is metrics.model("a")
    assert metrics.instance("i") is metrics.instance("i")
    assert metrics.shadow("a", "p") is metrics.shadow("a", "p")


@given(st.lists(st.text(), max_size=20))
def test_what_a_client_calls_a_model_never_becomes_a_label(names):
    metrics = Metrics(["coder"])
    for name in [*names, "coder"]:
        metrics.of(name, "", "").codes[404] += 1
        metrics.model(name).queued += 1
        metrics.shadow(name, "p").outcomes["failed"] += 1
    models = {dict(labels).get("model", "") for _, labels in read(metrics)}
    assert models <= {"", "coder"}
    unknown = sum(name != "coder" for name in names)
    assert metrics.of("", "", "").codes[404] == unknown


@given(
    st.lists(st.one_of(st.floats(0, 1000), st.sampled_from([0.025, 0.05, 0.1, 900.0])), max_size=40)
)
def test_our_histogram_counts_as_the_library_s_own(values):
    metrics = Metrics(["m"])
    ours = metrics.of("m", "p", "i").first_token
    registry = CollectorRegistry()
    theirs = LibraryHistogram("x", "x", buckets=ours.bounds, registry=registry)
    for one in values:
        ours.observe(one)
        theirs.observe(one)
    for bound, count in ours.buckets():
        assert registry.get_sample_value("x_bucket", {"le": bound}) == count
    assert registry.get_sample_value("x_sum") == ours.sum


def test_a_histogram_has_a_place_for_all():
    histogram = Histogram((1.0, 2.0))
    for seconds in (0, 1.0, 1.5, 2.0, 2.1, 1e9):
        histogram.observe(seconds)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 4), ("+Inf", 6)]


def test_names_of_the_configuration_are_escaped():
    metrics = Metrics(['a"b\\c'])
    metrics.of('a"b\\c', "p\n", "i").cut += 1
    found = read(metrics)
    assert value(found, "streams_cut_total", model='a"b\\c', pool="p\n", instance="i") == 1


def test_prometheus_own_reader_accepts_it():
    tool = [str(programs() / "promtool"), "check", "metrics"]
    done = subprocess.run(tool, input=busy().expose(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert CONTENT_TYPE.startswith("text/plain; version=")


def test_scraping_changes_nothing():
    metrics = busy()
    seen = [
        {key: number for key, number in read(metrics).items() if not key[0].startswith("process_")}
        for _ in range(3)
    ]
    assert seen[1:] == seen[:-1]
