"""Spans without the SDK's: whose trace a call falls into, whether it is told, and what others are told of it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from loanmesh.runtime import caller, semconv, tracing
from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.server import ServerInterceptor, _Call
from loanmesh.runtime.telemetry import _add_trace_id
from loanmesh.runtime.tracing import Recorder

METHOD = "lending.intake.v1.IntakeService/SubmitApplication"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Told:
    """What a process tells, with a recorder of the given share of new traces."""

    def __init__(self, sample_ratio: float) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        tracing.start(Recorder(provider, FakeClock(), random.Random(1), sample_ratio))

    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    yield
    tracing.start(None)
    tracing.enter("")


class Context:
    """A call's context, as far as its span looks at it."""

    def time_remaining(self) -> None: ...


def called(traceparent: str = "", status: str = "OK", brings: bool = False) -> tracing.Span | None:
    """A call from its beginning to its end."""
    caller.note_said({"traceparent": traceparent} if traceparent else {})
    with _Call(ServerInterceptor(SystemClock()), METHOD, Context()) as call:
        call._status = status
        if brings:
            tracing.current_traceparent()
        return call._span


def test_a_call_of_a_kept_trace_is_told_within_it() -> None:
    told = Told(0.0)
    called(f"00-{TRACE}-{CALLER}-01")
    (span,) = told.spans()
    assert span.context
    assert span.parent
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, CALLER)
    assert dict(span.attributes or {})[semconv.RPC_STATUS_CODE] == "OK"


@pytest.mark.parametrize(("status", "spans"), [("OK", 0), ("NOT_FOUND", 0), ("INTERNAL", 1), ("RESOURCE_EXHAUSTED", 1)])
def test_a_call_of_another_trace_is_told_where_we_failed_it(status: str, spans: int) -> None:
    told = Told(0.0)
    called(f"00-{TRACE}-{CALLER}-00", status)
    assert len(told.spans()) == spans


@pytest.mark.parametrize("brings", [True, False])
def test_only_calls_that_brought_something_are_remembered(brings: bool) -> None:
    told = Told(0.0)
    span = called(brings=brings)
    recorder = tracing.recorder()
    assert span
    assert recorder
    assert recorder.keep(span.at) is brings
    assert len(told.spans()) == int(brings)


def test_new_traces_are_kept_in_their_share_and_as_the_sdks_sampler_would() -> None:
    Told(0.05)
    recorder, sdk = tracing.recorder(), TraceIdRatioBased(0.05)
    assert recorder
    spans = [recorder.begin("") for _ in range(4000)]
    assert 0.03 < sum(span.kept for span in spans) / len(spans) < 0.07
    for span in spans:
        kept = sdk.should_sample(None, span.at.trace_id, "").decision is Decision.RECORD_AND_SAMPLE
        assert kept == span.kept
    assert all(not span.parent for span in spans)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_none_and_all_of_the_new_traces_can_be_kept(ratio: float) -> None:
    Told(ratio)
    recorder = tracing.recorder()
    assert recorder
    assert {recorder.begin("").kept for _ in range(100)} == {bool(ratio)}


def test_where_nothing_is_exported_a_callers_trace_still_travels() -> None:
    tracing.enter(f"00-{TRACE}-{CALLER}-01")
    assert tracing.current_traceparent() == f"00-{TRACE}-{CALLER}-01"
    assert tracing.enter("") is None
    assert tracing.current_traceparent() == ""


ITEM = f"00-{3:032x}-{4:016x}-00"


@pytest.mark.parametrize(("status", "spans"), [("OK", 0), ("INTERNAL", 3)])
def test_a_call_for_several_is_seen_in_the_trace_of_each(status: str, spans: int) -> None:
    told = Told(0.0)
    caller.note_said({"traceparent": f"00-{TRACE}-{CALLER}-00"})
    with _Call(ServerInterceptor(SystemClock()), METHOD, Context()) as call:
        call._status = status
        kept_with = [tracing.current_traceparent(item) for item in (ITEM, f"00-{5:032x}-{6:016x}-00")]
    assert [said[:36] for said in kept_with] == [f"00-{3:032x}-", f"00-{5:032x}-"]
    assert not {said.split("-")[2] for said in kept_with} & {f"{4:016x}", f"{6:016x}"}
    seen = {(span.context and span.context.trace_id, span.parent and span.parent.span_id) for span in told.spans()}
    assert seen == ({(int(TRACE, 16), int(CALLER, 16)), (3, 4), (5, 6)} if spans else set())
    recorder, place = tracing.recorder(), tracing.place_of(kept_with[0])
    assert recorder
    assert place
    assert recorder.keep(place)  # Of late ones it is told afterwards.
    assert len(told.spans()) == max(spans, 1)


def test_an_item_that_names_no_trace_is_in_that_of_its_call_or_in_its_own() -> None:
    Told(0.0)
    tracing.enter(f"00-{TRACE}-{CALLER}-00")
    the_calls = tracing.current_traceparent()
    assert tracing.current_traceparent("nonsense", own=True) == the_calls
    assert tracing.current_traceparent(f"00-{TRACE}-{CALLER}-00") == the_calls  # The call speaks for this one.
    tracing.enter("")
    assert tracing.current_traceparent() == tracing.current_traceparent("nonsense")
    assert len({tracing.current_traceparent(own=True).split("-")[1] for _ in range(3)}) == 3
    tracing.start(None)
    tracing.enter("")
    assert (tracing.current_traceparent(ITEM), tracing.current_traceparent("nonsense")) == (ITEM, "")


def test_what_is_apart_is_in_a_trace_of_its_own_until_it_ends() -> None:
    tracing.enter(f"00-{TRACE}-{CALLER}-01")
    with tracing.apart(tracing.Place(1, 2)):
        assert tracing.current_traceparent() == f"00-{1:032x}-{2:016x}-00"
    assert tracing.current_traceparent().startswith(f"00-{TRACE}")


def test_a_log_line_within_a_call_names_its_trace() -> None:
    Told(0.0)
    tracing.enter(f"00-{TRACE}-{CALLER}-00")
    assert _add_trace_id(None, "", {"event": "retried"})["trace_id"] == TRACE
