"""KEDA's external scaler: proto in, proto out. The metric is the number of replicas wanted, and its target is 1."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from externalscaler import externalscaler_pb2 as pb
from externalscaler.externalscaler_pb2_grpc import ExternalScalerServicer

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import InvalidRequest, Overloaded
from services.intake.scaler import Scaler

METRIC = "loanmesh-wanted-replicas"
LOOK_S = 2.0
"""How often an open stream looks whether anything changed."""
STREAM_S = 60.0
"""How long a stream lives; KEDA opens the next. Less than an aging connection's grace, so that none is cut off."""


class ScalerServicer(ExternalScalerServicer):
    """Answers KEDA. Errors are ours, made statuses by the server's interceptor."""

    def __init__(self, scaler: Scaler, clock: Clock, streams_max: int) -> None:
        self._scaler = scaler
        self._clock = clock
        self._streams_max = streams_max
        self._streams = 0
        self._leaving = False

    def leave(self) -> None:
        """This replica is about to end: streams end within LOOK_S, and KEDA asks another one."""
        self._leaving = True

    async def IsActive(self, request: pb.ScaledObjectRef, context: Any) -> pb.IsActiveResponse:
        """Whether there is anything to do."""
        self._scaler.read(request.scalerMetadata)
        return pb.IsActiveResponse(result=await self._scaler.is_active())

    async def GetMetricSpec(self, request: pb.ScaledObjectRef, context: Any) -> pb.GetMetricSpecResponse:
        """Always the same: one metric, in replicas."""
        self._scaler.read(request.scalerMetadata)
        return _spec()

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Any) -> pb.GetMetricsResponse:
        """How many replicas are wanted."""
        ask = self._scaler.read(request.scaledObjectRef.scalerMetadata)
        if request.metricName not in ("", METRIC):
            raise InvalidRequest(("metricName", f"is {request.metricName[:100]!r}; there is only {METRIC}"))
        replicas = await self._scaler.wanted(ask)
        value = pb.MetricValue(metricName=METRIC, metricValue=math.ceil(replicas), metricValueFloat=replicas)
        return pb.GetMetricsResponse(metricValues=[value])

    async def StreamIsActive(self, request: pb.ScaledObjectRef, context: Any) -> AsyncIterator[pb.IsActiveResponse]:
        """Whether there is anything to do, at once and at each change."""
        self._scaler.read(request.scalerMetadata)
        with self._one_stream():
            said: bool | None = None
            async for _ in self._looks():
                active = await self._scaler.is_active()
                if active is not said:
                    said = active
                    yield pb.IsActiveResponse(result=active)

    async def StreamMetricSpec(
        self, request: pb.ScaledObjectRef, context: Any
    ) -> AsyncIterator[pb.GetMetricSpecResponse]:
        """The spec at once; it never changes, since what changes is in the metric."""
        self._scaler.read(request.scalerMetadata)
        with self._one_stream():
            yield _spec()
            async for _ in self._looks():
                pass

    @contextmanager
    def _one_stream(self) -> Iterator[None]:
        if self._streams >= self._streams_max:
            raise Overloaded(f"{self._streams} streams are open already, as many as may be", retry_s=STREAM_S)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    async def _looks(self) -> AsyncIterator[None]:
        """A turn at once and one every LOOK_S, for as long as a stream lives."""
        ends_at = self._clock.monotonic() + STREAM_S
        while not self._leaving and self._clock.monotonic() < ends_at:
            yield
            await self._clock.sleep(LOOK_S)


def _spec() -> pb.GetMetricSpecResponse:
    return pb.GetMetricSpecResponse(metricSpecs=[pb.MetricSpec(metricName=METRIC, targetSize=1, targetSizeFloat=1.0)])
