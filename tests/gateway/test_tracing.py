"""Tracing: what a span says, whom it belongs to, and that it costs nothing when it is off."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from inferfleet.gateway.log import Record
from inferfleet.gateway.tracing import Tracer, TracingError

pytest.importorskip("opentelemetry.sdk.trace")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01".encode()
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00".encode()


def record(**more):
    return Record("id-1", "POST", "/v1/chat/completions", **more)


@pytest.fixture
def traced():
    """Makes tracers which export to memory; calling the second closes all and gives the spans."""
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, made = InMemorySpanExporter(), []

    def make(sample):
        made.append(Tracer("", sample, exporter))
        return made[-1]

    def spans():
        while made:
            made.pop().close()
        return exporter.get_finished_spans()

    yield make, spans
    spans()


def test_a_span_says_what_became_of_the_request(traced):
    make, spans = traced
    make(1.0).begin().end(
        record(
            model="coder",
            pool="gpu",
            instance="gpu-0",
            attempts=2,
            status=200,
            prompt_tokens=7,
            completion_tokens=3,
        )
    )
    (span,) = spans()
    assert span.name == "POST /v1/chat/completions"
    assert span.kind.name == "SERVER"
    assert span.parent is None
    assert span.status.status_code.name == "UNSET"
    assert dict(span.attributes) == {
        "http.request.method": "POST",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "gen_ai.request.model": "coder",
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "inferfleet.request_id": "id-1",
        "inferfleet.pool": "gpu",
        "inferfleet.instance": "gpu-0",
        "inferfleet.attempts": 2,
    }
    assert span.resource.attributes["service.name"] == "inferfleet-gateway"


def test_a_failed_request_is_a_span_with_an_error(traced):
    make, spans = traced
    make(1.0).begin().end(record(status=502, error="connect"))
    (span,) = spans()
    assert (span.status.status_code.name, span.status.description) == ("ERROR", "connect")
    assert span.attributes["error.type"] == "connect"
    assert "gen_ai.request.model" not in span.attributes


def test_a_span_belongs_to_the_client_s_trace_and_the_engine_s_to_the_span(traced):
    make, spans = traced
    span = make(0.0).begin(SAMPLED)
    span.end(record())
    (done,) = spans()
    assert f"{done.context.trace_id:032x}" == TRACE
    assert f"{done.parent.span_id:016x}" == PARENT
    assert span.traceparent == f"00-{TRACE}-{done.context.span_id:016x}-01".encode()


@pytest.mark.parametrize(
    ("sample", "traceparent", "count"),
    [(0.0, b"", 0), (1.0, b"", 1), (1.0, NOT_SAMPLED, 0), (0.0, SAMPLED, 1)],
)
def test_a_client_s_decision_goes_before_ours(traced, sample, traceparent, count):
    make, spans = traced
    make(sample).begin(traceparent).end(record())
    assert len(spans()) == count


@pytest.mark.parametrize("garbage", [b"00", b"\xff\xfe", b"\n", b"00-" + b"0" * 32, b"x" * 10_000])
def test_a_broken_traceparent_begins_a_new_trace(traced, garbage):
    make, spans = traced
    make(1.0).begin(garbage).end(record())
    (span,) = spans()
    assert span.parent is None


def test_the_sampled_part_is_about_as_large_as_configured(traced):
    make, spans = traced
    tracer = make(0.25)
    sampled = sum(tracer.begin().traceparent[-1:] in b"13579" for _ in range(2000))
    assert 350 < sampled < 650
    assert not spans()


@pytest.fixture
def collector():
    """A loopback OTLP/HTTP collector: its endpoint, and what was posted there."""
    posts = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            size = int(self.headers["content-length"])
            posts.append((self.path, self.headers["content-encoding"], self.rfile.read(size)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", posts
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_reach_a_collector_over_http(collector):
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, posts = collector
    tracer = Tracer(endpoint, 1.0)
    for status in range(200, 210):
        tracer.begin().end(record(status=status))
    tracer.close()
    ((path, encoding, body),) = posts
    assert (path, encoding) == ("/v1/traces", None)
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    spans = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["POST /v1/chat/completions"] * 10


def test_a_collector_that_is_down_holds_nothing_up(unused_port):
    tracer = Tracer(f"http://127.0.0.1:{unused_port}/v1/traces", 1.0)
    began = time.monotonic()
    for _ in range(5000):
        tracer.begin().end(record())
    assert time.monotonic() - began < 5
    began = time.monotonic()
    tracer.close(timeout=0.2)
    assert time.monotonic() - began < 2


@pytest.fixture
def unused_port():
    """A port that was free a moment ago."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_port


@pytest.mark.parametrize("sample", [-0.1, 1.1])
def test_a_sample_that_is_no_part_is_refused(sample):
    with pytest.raises(TracingError, match="from 0 to 1"):
        Tracer("http://127.0.0.1:1/v1/traces", sample)


@pytest.mark.parametrize("part", ["sdk.trace", "exporter.otlp.proto.http.trace_exporter"])
def test_a_missing_extra_is_named(monkeypatch, part):
    monkeypatch.setitem(sys.modules, f"opentelemetry.{part}", None)
    with pytest.raises(TracingError, match=r"inferfleet\[gateway-tracing\]"):
        Tracer("http://127.0.0.1:1/v1/traces", 1.0)


def test_nothing_is_imported_while_tracing_is_off():
    code = (
        "import sys, inferfleet.gateway.tracing\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
