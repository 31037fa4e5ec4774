"""OTLP messages as our spans and logs. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as PbSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from loanmesh.seeing.spans import Event, Log, Span, Value

_EPOCH_NS = 1e9


def spans_of(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """Every span of an export."""
    for resource in request.resource_spans:
        service, instance = process_of(resource.resource)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    name=span.name,
                    service=service,
                    instance=instance,
                    kind=PbSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    began=span.start_time_unix_nano / _EPOCH_NS,
                    ended=span.end_time_unix_nano / _EPOCH_NS,
                    error=(span.status.message or "error") if span.status.code == Status.STATUS_CODE_ERROR else "",
                    attributes=_facts(span.attributes),
                    events=tuple(
                        Event(e.time_unix_nano / _EPOCH_NS, e.name, _facts(e.attributes)) for e in span.events
                    ),
                )


def logs_of(request: ExportLogsServiceRequest) -> Iterator[Log]:
    """Every line of an export."""
    for resource in request.resource_logs:
        service, instance = process_of(resource.resource)
        for scope in resource.scope_logs:
            for line in scope.log_records:
                facts = _facts(line.attributes)
                said = str(facts.pop("trace_id", ""))
                yield Log(
                    at=(line.time_unix_nano or line.observed_time_unix_nano) / _EPOCH_NS,
                    # Who logs of one application within a batch names its trace; the record's own is the batch's.
                    trace_id=said or (line.trace_id.hex() if any(line.trace_id) else ""),
                    service=service,
                    instance=instance,
                    level=line.severity_text.lower() or "info",
                    event=str(_value(line.body)),
                    attributes=facts,
                )


def processes_of(
    request: ExportTraceServiceRequest | ExportLogsServiceRequest | ExportMetricsServiceRequest,
) -> Iterator[tuple[str, str]]:
    """(name, service) of each process that an export comes from."""
    match request:
        case ExportTraceServiceRequest():
            resources: Iterable[Any] = request.resource_spans
        case ExportLogsServiceRequest():
            resources = request.resource_logs
        case _:
            resources = request.resource_metrics
    for resource in resources:
        service, instance = process_of(resource.resource)
        yield instance, service


def process_of(resource: Any) -> tuple[str, str]:
    """Service and name of the process that a resource names; '' where it does not."""
    facts = _facts(resource.attributes)
    return str(facts.get("service.name", "")), str(facts.get("service.instance.id", ""))


def _facts(attributes: Iterable[KeyValue]) -> dict[str, Value]:
    return {one.key: _value(one.value) for one in attributes}


def _value(value: AnyValue) -> Value:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "int_value":
            return value.int_value
        case "double_value":
            return value.double_value
        case "array_value":
            return ",".join(str(_value(one)) for one in value.array_value.values)
        case "bytes_value":
            return value.bytes_value.hex()
        case _:
            return ""
