"""A collector in the test's own process: keeps metrics and logs exported to it, and names of spans."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2_grpc as logs_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord

from tests.prometheus import Emitted, emitted


@dataclass
class Collected:
    """What came, by service."""

    endpoint: str = ""
    metrics: dict[str, dict[str, Emitted]] = field(default_factory=dict)
    spans: list[str] = field(default_factory=list)
    """Names of the spans of all services, as they came."""
    logs: list[LogRecord] = field(default_factory=list)

    def all(self) -> dict[str, Emitted]:
        """Every metric by name; attributes of all services together."""
        found: dict[str, Emitted] = {}
        for metrics in self.metrics.values():
            for name, metric in metrics.items():
                before = found.get(name, metric)
                found[name] = Emitted(name, metric.kind, metric.unit, before.attributes | metric.attributes)
        return found


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, collected: Collected) -> None:
        self._collected = collected

    async def Export(
        self, request: metrics_pb.ExportMetricsServiceRequest, context: object
    ) -> metrics_pb.ExportMetricsServiceResponse:
        for resource in request.resource_metrics:
            said = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert said["service.namespace"] == "loanmesh"
            assert said["service.instance.id"]
            known = self._collected.metrics.setdefault(said["service.name"], {})
            for scope in resource.scope_metrics:
                for metric in map(emitted, scope.metrics):
                    before = known.get(metric.name, metric)
                    known[metric.name] = Emitted(
                        metric.name, metric.kind, metric.unit, before.attributes | metric.attributes
                    )
        return metrics_pb.ExportMetricsServiceResponse()


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, collected: Collected) -> None:
        self._collected = collected

    async def Export(
        self, request: trace_pb.ExportTraceServiceRequest, context: object
    ) -> trace_pb.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self._collected.spans += [span.name for scope in resource.scope_spans for span in scope.spans]
        return trace_pb.ExportTraceServiceResponse()


class _Logs(logs_grpc.LogsServiceServicer):
    def __init__(self, collected: Collected) -> None:
        self._collected = collected

    async def Export(
        self, request: logs_pb.ExportLogsServiceRequest, context: object
    ) -> logs_pb.ExportLogsServiceResponse:
        for resource in request.resource_logs:
            self._collected.logs += [record for scope in resource.scope_logs for record in scope.log_records]
        return logs_pb.ExportLogsServiceResponse()


@asynccontextmanager
async def collecting(credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[Collected]:
    """Serves on a free port while inside; with credentials over TLS, as localhost."""
    collected, server = Collected(), grpc.aio.server()
    metrics_grpc.add_MetricsServiceServicer_to_server(_Metrics(collected), server)  # type: ignore[no-untyped-call]  # It has no types.
    trace_grpc.add_TraceServiceServicer_to_server(_Traces(collected), server)  # type: ignore[no-untyped-call]  # Nor has it.
    logs_grpc.add_LogsServiceServicer_to_server(_Logs(collected), server)  # type: ignore[no-untyped-call]  # Nor has it.
    if credentials:
        collected.endpoint = f"https://localhost:{server.add_secure_port('127.0.0.1:0', credentials)}"
    else:
        collected.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collected
    await server.stop(0)
