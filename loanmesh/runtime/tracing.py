"""Traces across a queue: the context an application came with, and the span of a batch linked to all of them.

A batch serves many traces: its span stands in the trace of its first recorded application and is linked to those of
the others (OpenTelemetry messaging conventions), so that whoever looks at one finds the batch that decided it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

BATCH_COUNT = "messaging.batch.message_count"
OPERATION = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
_tracer = trace.get_tracer("loanmesh")
_propagator = TraceContextTextMapPropagator()


def current_traceparent() -> str:
    """The W3C trace context of the call under way, to be kept with what it brought; '' where there is none."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


@contextmanager
def linked_span(operation: str, traceparents: Sequence[str]) -> Iterator[Span]:
    """The span of one batch, recorded when any application in it is; an exception marks it as failed."""
    # The last two digits are flags, the lowest of which says that the trace is recorded.
    recorded = [parent for parent in traceparents if parent and int(parent[-2:], 16) & 1]
    if not recorded:
        # Nobody's trace is kept: a span that is thrown away costs as much as a batch's worth of SQL.
        yield trace.INVALID_SPAN
        return
    contexts = [trace.get_current_span(_propagator.extract({"traceparent": p})).get_span_context() for p in recorded]
    with _tracer.start_as_current_span(
        f"{operation} applications",
        # As a root it would be sampled by itself, and mostly be missing where an application's trace is kept.
        context=_propagator.extract({"traceparent": recorded[0]}),
        kind=SpanKind.CONSUMER,
        links=[Link(context) for context in contexts[1:]],
        attributes={OPERATION: "process", DESTINATION: "applications", BATCH_COUNT: len(traceparents)},
    ) as span:
        yield span
