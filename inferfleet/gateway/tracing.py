"""Traces of requests, if configured: one OpenTelemetry span each, sent in batches by a thread.

Nothing of OpenTelemetry is imported before `Tracer` is made.
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import Any

from inferfleet.gateway.log import Record

_EXTRA = "pip install 'inferfleet[gateway-tracing]'"


class TracingError(Exception):
    """Tracing is configured and cannot be had."""


class Span:
    """One request; `traceparent` tells the engine of it (W3C Trace Context)."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any, traceparent: bytes) -> None:
        self._span = span
        self.traceparent = traceparent

    def end(self, record: Record) -> None:
        """Says what became of the request, which ends now."""
        span = self._span
        if span.is_recording():
            span.update_name(f"{record.method} {record.path}")
            span.set_attributes(_attributes(record))
            if record.error or record.status >= 500:
                span.set_status(_status_error(), record.error or None)
        span.end()


class Tracer:
    """Makes the spans of one worker and exports them.

    A thread does not survive a fork: make it in the process that uses it.
    """

    def __init__(self, endpoint: str, sample: float, exporter: Any = None) -> None:
        """Sends to an OTLP/HTTP `endpoint` (".../v1/traces"), or through another exporter.

        `sample` is the part (0 to 1) of requests traced among those that bring no decision of
        their client's. Raises `TracingError` if OpenTelemetry is not installed.
        """
        if not 0 <= sample <= 1:
            raise TracingError(f"tracing: sample must be from 0 to 1, not {sample}")
        trace, sampling = _part("sdk.trace"), _part("sdk.trace.sampling")
        resource = _part("sdk.resources").Resource.create({"service.name": "inferfleet-gateway"})
        if exporter is None:
            http = _part("exporter.otlp.proto.http.trace_exporter")
            exporter = http.OTLPSpanExporter(endpoint=endpoint)
        self._provider = trace.TracerProvider(
            resource=resource,
            sampler=sampling.ParentBasedTraceIdRatio(sample),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(_part("sdk.trace.export").BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("inferfleet.gateway")
        self._kind = _part("trace").SpanKind.SERVER
        self._w3c = _part("trace.propagation.tracecontext").TraceContextTextMapPropagator()
        self._set = _part("trace").set_span_in_context

    def begin(self, traceparent: bytes = b"") -> Span:
        """A request comes; `traceparent` is that header of the client's, if it sent one."""
        parent = self._w3c.extract({"traceparent": traceparent.decode("latin-1")})
        span = self._tracer.start_span("request", context=parent, kind=self._kind)
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier, context=self._set(span))
        return Span(span, carrier.get("traceparent", "").encode())

    def close(self, timeout: float = 5.0) -> None:
        """Sends what waits; gives up after `timeout` seconds, if no collector answers."""
        # the provider alone would try for half a minute, and again when the process ends
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(timeout)


def _part(name: str) -> Any:
    try:
        return import_module(f"opentelemetry.{name}")
    except ImportError as error:
        raise TracingError(f"tracing needs {error.name}: {_EXTRA}") from error


def _status_error() -> Any:
    return _part("trace").StatusCode.ERROR


def _attributes(record: Record) -> dict[str, str | int]:
    """Names of OpenTelemetry's conventions where there are some; without what is not known."""
    said: dict[str, str | int | None] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "http.response.status_code": record.status or None,
        "error.type": record.error or None,
        "gen_ai.request.model": record.model or None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "inferfleet.request_id": record.request_id,
        "inferfleet.pool": record.pool or None,
        "inferfleet.instance": record.instance or None,
        "inferfleet.attempts": record.attempts,
    }
    return {name: value for name, value in said.items() if value is not None}
