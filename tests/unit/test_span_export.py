"""Our encoder of spans makes what the SDK's makes."""

from __future__ import annotations

import random

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.span_export import encode
from loanmesh.runtime.tracing import Place, Recorder


def spans(scopes: tuple[str, ...] = ("loanmesh",), value: object = "court") -> tuple[ReadableSpan, ...]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "intake", "service.instance.id": "i-1"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    told = Recorder(provider, FakeClock(), random.Random(1))
    told.tell(
        "ask court", Place(0xABC, 2), 1, 1.0, 2.5, kind="client", error="timeout", links=[Place(5, 6)],
        attributes={"loanmesh.source": "court", "n": 3, "share": 0.5, "ok": True},
        events=[("attempt_failed", 1.5, {"attempt": 1})],
    )  # fmt: skip
    told.tell("root", Place(0xABC, 1), 0, 1.0, 2.5, kind="server")
    for scope in scopes:
        with trace.use_span(trace.NonRecordingSpan(trace.INVALID_SPAN_CONTEXT)):
            recorded = provider.get_tracer(scope).start_span("recorded", attributes={"v": value})  # type: ignore[dict-item]  # Odd on purpose.
            recorded.set_status(trace.StatusCode.OK)
            recorded.end()
    return exporter.get_finished_spans()


def test_spans_are_encoded_as_the_sdk_does() -> None:
    for made in (spans(), spans(("loanmesh", "another")), spans(value=("a", "b"))):
        assert encode(made) == encode_spans(made)
