"""A promotion on a real mesh: what was foretold happens, and KEDA hears how many replicas it takes."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import grpc
import pytest
from externalscaler import externalscaler_pb2 as pb
from externalscaler.externalscaler_pb2_grpc import ExternalScalerStub

from benchmarks import ours
from benchmarks.bench import Bench
from benchmarks.foretold import OFF_MAX, foretold, lived, off
from benchmarks.machine import Cores
from lab.population import Population
from loanmesh.cli.mesh import Mesh
from loanmesh.client import Client
from loanmesh.promotion.capacity import SERVICES
from loanmesh.runtime.clock import SystemClock
from tests.e2e.conftest import set_fault
from tests.promotions import a_promotion

SEED = 1


async def test_what_is_foretold_is_what_a_mesh_lives_through(tmp_path: Path) -> None:
    """A source's quota bounds it, far below what any machine does: what is compared is arithmetic, not speed."""
    one_each = {name: {"usual": 1, "most": 1} for name in SERVICES}
    promotion = a_promotion(usual=0, peak=120, length_s=4, sources={"tax": {"a_second": 30}}, replicas=one_each)
    everywhere = frozenset(os.sched_getaffinity(0))
    bench = Bench(True, SEED, SystemClock(), Cores(everywhere, everywhere), tmp_path, print)
    said, was = foretold(promotion, SEED), await lived(bench, promotion)
    assert off(said.backlog_peak, was.backlog_peak) <= OFF_MAX, f"{said} was foretold, {was} is true"
    assert off(said.drain_s, was.drain_s) <= OFF_MAX, f"{said} was foretold, {was} is true"


@pytest.mark.parametrize("mesh", ["sqlite"], indirect=True)
async def test_keda_hears_how_many_replicas_a_backlog_takes(mesh: Mesh, client: Client) -> None:
    await set_fault(mesh, "tax", quota_per_s=1)
    clock = SystemClock()
    applications = ours.prepare(Population(SEED), 0, 60, clock)
    assert await ours.submit_many(client, applications) == 60
    async with grpc.aio.insecure_channel(mesh.parts["intake"].address) as channel:
        stub = ExternalScalerStub(channel)

        async def wanted(service: str) -> float:
            metadata = {"service": service, "ratePerReplica": "1", "drainSeconds": "10"}
            ref = pb.ScaledObjectRef(name=service, namespace="loanmesh", scalerMetadata=metadata)
            answer = await stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=ref))
            return answer.metricValues[0].metricValueFloat

        async with asyncio.timeout(20):
            while await wanted("bureau") <= 1:
                await clock.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError, match="it must be one of intake") as refused:
            await wanted("brokerage")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
