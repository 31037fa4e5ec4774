"""Logs, traces and metrics: how they leave the process. The names they go by stand in `semconv.py`.

Everything goes out over OTLP/gRPC from threads with bounded queues: a collector that is slow or away costs what it
would have been told, and nothing else.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog
from opentelemetry import metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from loanmesh.runtime import semconv, tracing
from loanmesh.runtime.breaker import State
from loanmesh.runtime.clock import SystemClock, new_owner
from loanmesh.runtime.histogram import Exporting, Histogram
from loanmesh.runtime.measures import Measure
from loanmesh.runtime.redaction import redact

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider

    from loanmesh.runtime.settings import TelemetrySettings
    from loanmesh.runtime.vitals import Vitals

SPANS_WAITING_MAX = 20_000
"""Spans that wait for the exporter; beyond, the oldest are dropped. A few seconds of an outage at full load."""
EXPORT_S_MAX = 3.0
"""How long one export may take before it counts as failed."""
STOP_S_MAX = 2.0
"""How long a process that ends waits for what it still has to send."""
_LOGS_WAITING_MAX = 2_000
_logs: LoggerProvider | None = None
_instance = ""
_histograms: dict[str, Histogram] = {}


def start_telemetry(service: str, owner: str, settings: TelemetrySettings) -> None:
    """Set up logs on stderr as JSON lines, and logs, traces and metrics towards the OTLP endpoints where some are set.

    owner  names the process; what it tells is told under this name.
    """
    global _instance
    _instance = owner
    # A user's own OTEL_* variable counts where nothing is set for us.
    endpoints = settings.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _add_trace_id,
            *([_send] if endpoints else []),
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
    # Without an endpoint no provider is set: the API then costs next to nothing, and context still travels.
    if endpoints:
        _export(service, owner, [one.strip() for one in endpoints.split(",")], settings)


def _export(service: str, owner: str, endpoints: list[str], settings: TelemetrySettings) -> None:
    from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

    from loanmesh.runtime.span_export import SpanExporter

    # The SDK complains of each export that fails on the root logger's last resort, with a stack trace.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create({"service.name": service, "service.instance.id": owner, "service.namespace": "loanmesh"})
    # Over TLS the exporter finds CA and certificate by OpenTelemetry's own variables.
    to: list[dict[str, Any]] = [
        {"endpoint": one, "insecure": not one.startswith("https://"), "timeout": EXPORT_S_MAX} for one in endpoints
    ]
    provider = TracerProvider(resource=resource)
    for where in to:
        exporter = SpanExporter(**where)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=SPANS_WAITING_MAX, schedule_delay_millis=1000)
        )
    trace.set_tracer_provider(provider)
    clock = SystemClock()
    tracing.start(tracing.Recorder(provider, clock, random.Random(), settings.sample_ratio))
    readers = [
        PeriodicExportingMetricReader(
            Exporting(OTLPMetricExporter(**where), _histograms.values()),
            settings.metrics_every_s * 1000,
            EXPORT_S_MAX * 1000,
        )
        for where in to
    ]
    bounds = ExplicitBucketHistogramAggregation(semconv.DURATION_BOUNDS_S)
    views = [View(instrument_name=semconv.LOOP_LAG, aggregation=bounds)]
    metrics.set_meter_provider(MeterProvider(readers, resource=resource, views=views))
    global _logs
    _logs = LoggerProvider(resource)
    for where in to:
        _logs.add_log_record_processor(
            BatchLogRecordProcessor(OTLPLogExporter(**where), 1000, max_queue_size=_LOGS_WAITING_MAX)
        )


def instance(service: str) -> str:
    """The name of this process, the same in leases, spans and logs; a new one where telemetry was not begun."""
    return _instance or new_owner(service)


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
    """Records what is distributed, with what it is recorded by; one a measure and process."""
    return histogram(measure).record


def histogram(measure: Measure) -> Histogram:
    """The process's one histogram of a measure."""
    clock = SystemClock()
    return _histograms.setdefault(measure.name, Histogram(measure, lambda: int(clock.now().timestamp() * 1e9)))


def observe(vitals: Vitals) -> Callable[[float], None]:
    """Show a process's vitals as metrics, read when they are exported; returns the recorder of loop lags, seconds.

    Exported from another thread: reads plain numbers only. Names of dependencies, queues and steps, never an id.
    """
    meter = metrics.get_meter("loanmesh")

    def show(kind: str, name: str, unit: str, read: Callable[[Vitals], Iterator[Observation]]) -> None:
        def callback(_: CallbackOptions) -> Iterable[Observation]:
            return list(read(vitals))

        getattr(meter, f"create_observable_{kind}")(name, [callback], unit=unit)

    show("up_down_counter", semconv.BREAKER_STATE, "{breaker}", _breaker_states)
    show("counter", semconv.BREAKER_CHANGES, "{change}", _breaker_changes)
    show("counter", semconv.DEPENDENCY_CALLS, "{call}", _calls)
    show("up_down_counter", semconv.BULKHEAD_IN_USE, "{call}", lambda v: _each(v, "in_use"))
    show("up_down_counter", semconv.BULKHEAD_WAITING, "{call}", lambda v: _each(v, "waiting"))
    show("up_down_counter", semconv.QUEUE_LENGTH, "{entry}", _queues)
    show("gauge", semconv.BACKLOG, "{application}", _backlog)
    show("gauge", semconv.BACKLOG_AGE, "s", lambda v: _standing(v, "backlog_age_s"))
    show("gauge", semconv.PENDING_AGE, "s", lambda v: _standing(v, "pending_age_s"))
    show("gauge", semconv.UNOWNED, "{application}", lambda v: _standing(v, "unowned"))
    show("gauge", semconv.PARKED_NOW, "{application}", lambda v: _standing(v, "parked"))
    show("counter", semconv.OFFERED, "{application}", lambda v: _tally(v.offered, "loanmesh.priority"))
    show("counter", semconv.ACCEPTED, "{application}", lambda v: _tally(v.accepted, "loanmesh.priority"))
    show("counter", semconv.DECISIONS, "{decision}", _decisions)
    show("counter", semconv.SOURCE_REPORTS, "{report}", _source_reports)
    show("counter", semconv.SOURCE_SPEND, "{fen}", _source_spend)
    show("gauge", semconv.SOURCE_OBSERVED, "s", _source_observed)
    show("counter", semconv.DEGRADED, "{decision}", lambda v: _tally(v.degradations, "loanmesh.step"))
    show("counter", semconv.PARKED, "{application}", lambda v: _tally(v.parked, "loanmesh.stage"))
    show("up_down_counter", semconv.DEGRADATION_IN_FORCE, "{step}", _steps)
    return meter.create_histogram(semconv.LOOP_LAG, unit="s").record


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
    """Send what is still held back; a collector that does not take it holds up nobody for longer than two seconds."""

    def stop() -> None:
        for provider in (trace.get_tracer_provider(), metrics.get_meter_provider(), _logs):
            shutdown = getattr(provider, "shutdown", None)  # The API's own providers have none.
            if shutdown:
                shutdown()

    stopping = threading.Thread(target=stop, name="stop-telemetry", daemon=True)
    stopping.start()
    stopping.join(STOP_S_MAX)
    tracing.start(None)


def _add_trace_id(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    span = tracing.current()
    if span:
        event.setdefault("trace_id", f"{span.at.trace_id:032x}")
    return event


_SEVERITIES = {"debug": 5, "info": 9, "warning": 13, "error": 17, "critical": 21}


def _send(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Over OTLP too: the event's word as the body, what it says as attributes, an error by its type alone. Masked as
    on stderr, in a copy: the line's own masking comes after its error was put into words."""
    if _logs is not None:
        from opentelemetry._logs import SeverityNumber

        level = str(event.get("level", "info"))
        shown = redact(None, "", {k: v for k, v in event.items() if k != "exc_info"})
        said = {k: v if isinstance(v, str | int | float | bool) else str(v)
                for k, v in shown.items() if k not in ("event", "level", "service")}  # fmt: skip
        error = event.get("exc_info")
        if isinstance(error, tuple):  # As the standard library's logging has it.
            error = error[1]
        if isinstance(error, BaseException):
            said[semconv.EXCEPTION_TYPE] = type(error).__name__
        _logs.get_logger("loanmesh").emit(
            observed_timestamp=None,
            severity_number=SeverityNumber(_SEVERITIES.get(level, 9)),
            severity_text=level,
            body=str(shown.get("event", "")),
            attributes=said,
            event_name=str(shown.get("event", "")),
        )
    return event
