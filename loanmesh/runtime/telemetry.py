"""Logs, traces and metrics: how they leave the process, and the names they go by.

Names follow the OpenTelemetry RPC conventions that are stable since 1.45; the Python constants are older.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO, cast

import structlog
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from loanmesh.runtime.breaker import State
from loanmesh.runtime.measures import Measure
from loanmesh.runtime.redaction import redact

if TYPE_CHECKING:
    from loanmesh.runtime.settings import TelemetrySettings
    from loanmesh.runtime.vitals import Vitals

RPC_SYSTEM_NAME = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.status_code"
ERROR_TYPE = "error.type"
SERVER_DURATION = "rpc.server.call.duration"
CLIENT_DURATION = "rpc.client.call.duration"
LOOP_LAG = "loanmesh.loop.lag"
DURATION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


def start_telemetry(service: str, owner: str, settings: TelemetrySettings) -> None:
    """Set up logs on stderr as JSON lines, and traces and metrics towards the OTLP endpoint where one is set."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_trace_id,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _Log(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    resource = Resource.create({"service.name": service, "service.instance.id": owner, "service.namespace": "loanmesh"})
    # Without an endpoint no provider is set: the API then costs next to nothing, and context still travels.
    if settings.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
        provider = TracerProvider(resource=resource, sampler=sampler)
        exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint, insecure=True)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=settings.otlp_endpoint, insecure=True))
        bounds = ExplicitBucketHistogramAggregation(DURATION_BOUNDS_S)
        views = [
            View(instrument_name=name, aggregation=bounds) for name in (SERVER_DURATION, CLIENT_DURATION, LOOP_LAG)
        ]
        metrics.set_meter_provider(MeterProvider([reader], resource=resource, views=views))


class _Log:
    """Where lines go. One that cannot be written is dropped: a full disk must not end the work that it tells of."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


def recorder(measure: Measure) -> Callable[[float, Mapping[str, str]], None]:
    """Records what is distributed, with what it is recorded by; nothing where nothing is exported."""
    made = metrics.get_meter("loanmesh").create_histogram(
        measure.name, unit=measure.unit, explicit_bucket_boundaries_advisory=measure.bounds
    )
    return made.record


def observe(vitals: Vitals) -> Callable[[float], None]:
    """Show a process's vitals as metrics, read when they are exported; returns the recorder of loop lags, seconds.

    Exported from another thread: reads plain numbers only. Names of dependencies, queues and steps, never an id.
    """
    meter = metrics.get_meter("loanmesh")

    def show(kind: str, name: str, unit: str, read: Callable[[Vitals], Iterator[Observation]]) -> None:
        def callback(_: CallbackOptions) -> Iterable[Observation]:
            return list(read(vitals))

        getattr(meter, f"create_observable_{kind}")(name, [callback], unit=unit)

    show("up_down_counter", "loanmesh.breaker.state", "{breaker}", _breaker_states)
    show("counter", "loanmesh.breaker.changes", "{change}", _breaker_changes)
    show("counter", "loanmesh.dependency.calls", "{call}", _calls)
    show("up_down_counter", "loanmesh.bulkhead.in_use", "{call}", lambda v: _each(v, "in_use"))
    show("up_down_counter", "loanmesh.bulkhead.waiting", "{call}", lambda v: _each(v, "waiting"))
    show("up_down_counter", "loanmesh.queue.length", "{entry}", _queues)
    show("gauge", "loanmesh.backlog", "{application}", _backlog)
    show("gauge", "loanmesh.backlog.age", "s", lambda v: _standing(v, "backlog_age_s"))
    show("gauge", "loanmesh.pending.age", "s", lambda v: _standing(v, "pending_age_s"))
    show("gauge", "loanmesh.applications.unowned", "{application}", lambda v: _standing(v, "unowned"))
    show("counter", "loanmesh.applications.offered", "{application}", lambda v: _tally(v.offered, "loanmesh.priority"))
    show(
        "counter", "loanmesh.applications.accepted", "{application}", lambda v: _tally(v.accepted, "loanmesh.priority")
    )
    show("counter", "loanmesh.decisions", "{decision}", _decisions)
    show("counter", "loanmesh.source.reports", "{report}", _source_reports)
    show("counter", "loanmesh.source.spend", "{fen}", _source_spend)
    show("gauge", "loanmesh.source.observed", "s", _source_observed)
    show("counter", "loanmesh.degradations", "{decision}", lambda v: _tally(v.degradations, "loanmesh.step"))
    show("counter", "loanmesh.applications.parked", "{application}", lambda v: _tally(v.parked, "loanmesh.stage"))
    show("up_down_counter", "loanmesh.degradation.in_force", "{step}", _steps)
    return meter.create_histogram(LOOP_LAG, unit="s").record


def _breaker_states(vitals: Vitals) -> Iterator[Observation]:
    # One series a state, 1 for the one it is in, as conventions have it for states.
    for guard in vitals.guards:
        for state in State:
            at = {"loanmesh.dependency": guard.name, "loanmesh.breaker.state": state.value}
            yield Observation(int(guard.breaker.state is state), at)


def _breaker_changes(vitals: Vitals) -> Iterator[Observation]:
    for guard in vitals.guards:
        for state in State:
            at = {"loanmesh.dependency": guard.name, "loanmesh.breaker.state": state.value}
            yield Observation(guard.breaker.changes[state], at)


def _calls(vitals: Vitals) -> Iterator[Observation]:
    for guard in vitals.guards:
        passed = guard.calls - guard.failures - guard.overloads
        counts = {"passed": passed, "failed": guard.failures, "overloaded": guard.overloads, "refused": guard.refusals}
        for outcome, count in counts.items():
            yield Observation(count, {"loanmesh.dependency": guard.name, "loanmesh.outcome": outcome})


def _each(vitals: Vitals, name: str) -> Iterator[Observation]:
    for guard in vitals.guards:
        yield Observation(getattr(guard, name), {"loanmesh.dependency": guard.name})


def _queues(vitals: Vitals) -> Iterator[Observation]:
    for queue in vitals.queues:
        yield Observation(queue.length(), {"loanmesh.queue": queue.name})


def _backlog(vitals: Vitals) -> Iterator[Observation]:
    if vitals.backlog is not None:
        yield Observation(vitals.backlog)


def _standing(vitals: Vitals, name: str) -> Iterator[Observation]:
    if vitals.standing is not None:
        yield Observation(getattr(vitals.standing, name))


def _decisions(vitals: Vitals) -> Iterator[Observation]:
    for decision, count in list(vitals.decisions.items()):
        at = {"loanmesh.outcome": decision.outcome, "loanmesh.product": decision.product}
        yield Observation(count, {**at, "loanmesh.grade": decision.grade})


def _source_reports(vitals: Vitals) -> Iterator[Observation]:
    for source, figures in vitals.sources.items():
        for state, count in list(figures.reports.items()):
            yield Observation(count, {"loanmesh.source": source, "loanmesh.report.state": state})


def _source_spend(vitals: Vitals) -> Iterator[Observation]:
    for source, figures in vitals.sources.items():
        yield Observation(figures.answered * figures.query_fen, {"loanmesh.source": source})


def _source_observed(vitals: Vitals) -> Iterator[Observation]:
    for source, figures in vitals.sources.items():
        if figures.observed_at is not None:
            yield Observation(figures.observed_at, {"loanmesh.source": source})


def _tally(counts: dict[str, int], attribute: str) -> Iterator[Observation]:
    for what, count in list(counts.items()):
        yield Observation(count, {attribute: what})


def _steps(vitals: Vitals) -> Iterator[Observation]:
    for step in vitals.steps:
        yield Observation(int(step.in_force), {"loanmesh.step": step.name, "loanmesh.subject": step.subject})


def stop_telemetry() -> None:
    """Send what is still held back."""
    for provider in (trace.get_tracer_provider(), metrics.get_meter_provider()):
        if isinstance(provider, TracerProvider | MeterProvider):
            provider.shutdown()


def _add_trace_id(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
    return event
