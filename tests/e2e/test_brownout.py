"""A source too slow for the load: bureau goes without it where policy may, says so, and comes back by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.ops.v1 import ops_service_pb2 as ops_pb
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub

from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application
from tests.e2e.conftest import set_fault

CLOCK = SystemClock()
STEP = "skip_optional_sources"


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    """A mesh on SQLite whose bureau asks four queries at once of each source, so that a small load is a large one."""
    monkeypatch.setenv("BUREAU_GATHER__AT_ONCE_MAX", "4")
    started = Mesh(tmp_path / "state", None, free_ports(), CLOCK, print)
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


async def decide(client: Client, first: int, count: int) -> list[pb.Application]:
    async def one(index: int) -> pb.Application:
        stored = await client.submit(an_application("person", index, CLOCK.now()))
        return [changed async for changed in client.watch(stored.name)][-1]

    return list(await asyncio.gather(*(one(first + i) for i in range(count))))


async def steps_in_force(mesh: Mesh) -> set[tuple[str, str]]:
    async with grpc.aio.insecure_channel(mesh.parts["bureau"].address) as channel:
        status = await OpsServiceStub(channel).GetStatus(ops_pb.GetStatusRequest())
    return {(step.step, step.subject) for step in status.degradations}


async def test_overload_is_bridged_recorded_and_left_without_a_restart(mesh: Mesh) -> None:
    async with Client(mesh.parts["intake"].address, patience_s=60) as client:
        await set_fault(mesh, "bank_flow", latency_ms=700)
        before = asyncio.create_task(decide(client, 0, 80))
        async with asyncio.timeout(30):
            while (STEP, "bank_flow") not in await steps_in_force(mesh):
                await CLOCK.sleep(0.05)
        decided = [*await decide(client, 200, 10), *await before]
        without = [a for a in decided if f"{STEP}:bank_flow" in a.decision.degradations]
        assert without
        declined = pb.Decision.OUTCOME_DECLINED
        assert all(a.state == pb.Application.STATE_DECIDED for a in decided)
        assert not any(a.decision.degradations for a in decided if a.decision.outcome == declined)
        assert all("without_bank_flow" in a.decision.degradations for a in without)

        await set_fault(mesh, "bank_flow")
        async with asyncio.timeout(30):
            while await steps_in_force(mesh):
                await CLOCK.sleep(0.1)
        assert not any(a.decision.degradations for a in await decide(client, 1000, 5))
