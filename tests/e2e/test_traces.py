"""Traces as a collector receives them: one application can be followed from its caller's call to the last service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application

CLOCK = SystemClock()
SERVICES = ("intake", "bureau", "scoring", "pricing")


class Collector(trace_grpc.TraceServiceServicer, metrics_grpc.MetricsServiceServicer):
    """Keeps what it is sent: spans by service, and the names of metrics."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.metrics: set[str] = set()

    async def Export(self, request, context):  # type: ignore[no-untyped-def]  # One name in two services.
        if isinstance(request, metrics_pb.ExportMetricsServiceRequest):
            for resource in request.resource_metrics:
                self.metrics |= {m.name for scope in resource.scope_metrics for m in scope.metrics}
            return metrics_pb.ExportMetricsServiceResponse()
        for resource in request.resource_spans:
            name = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
            self.spans += [(name, span) for scope in resource.scope_spans for span in scope.spans]
        return trace_pb.ExportTraceServiceResponse()


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that all services of a mesh started now will send to, every trace sampled."""
    made, server = Collector(), grpc.aio.server()
    trace_grpc.add_TraceServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]  # It has no types.
    metrics_grpc.add_MetricsServiceServicer_to_server(made, server)  # type: ignore[no-untyped-call]  # Nor has it.
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for service in SERVICES:
        monkeypatch.setenv(f"{service.upper()}_TELEMETRY__OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv(f"{service.upper()}_TELEMETRY__SAMPLE_RATIO", "1")
    yield made
    await server.stop(0)


async def test_one_trace_leads_from_the_call_to_every_service(collector: Collector, tmp_path: Path) -> None:
    mesh = Mesh(tmp_path / "state", None, free_ports(), CLOCK, print)
    try:
        await mesh.start()
        # Each in a call of its own; what a shared one tells, tests/unit/test_tracing.py says.
        async with Client(mesh.parts["intake"].address, share_from=1000) as client:
            jobs = [client.submit(an_application("person", n, CLOCK.now()), wait_s=20) for n in range(8)]
            decided = await asyncio.gather(*jobs)
    finally:
        await mesh.stop()  # Services send what they hold when they end.
    assert all(application.HasField("decision") for application in decided)
    submits = [span for _, span in collector.spans if span.name.endswith("/SubmitApplication") and span.kind == 2]
    assert len({span.trace_id for span in submits}) == 8
    for submit in submits:
        inside = [(name, span) for name, span in collector.spans if span.trace_id == submit.trace_id]
        assert {name for name, _ in inside} == set(SERVICES)
        attempt = next(span for _, span in inside if span.name == "process applications")
        assert attempt.parent_span_id == submit.span_id
        asked = {span.name.removeprefix("ask ") for name, span in inside if span.name.startswith("ask ")}
        assert asked == {"central_bank", "tax", "registry", "court", "bank_flow"}
        # What a recorded span costs is known; how many there are of them is what would grow unseen.
        assert len(inside) <= 15
    assert {"rpc.server.call.duration", "rpc.client.call.duration"} <= collector.metrics
    said = "".join(str(span) for _, span in collector.spans)
    assert not any(party.identity.value in said for one in decided for party in one.parties)
