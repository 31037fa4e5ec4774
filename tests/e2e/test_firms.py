"""The 302 real firms, each decided once, whoever is killed meanwhile. Skipped without the data."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from rich.console import Console

from loanmesh.cli.firms import decide_firms, read_firms, teach
from loanmesh.cli.mesh import START_ORDER, Mesh
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock
from tests.e2e.conftest import set_fault

DATA = Path(os.environ.get("LOANMESH_DATA", Path(__file__).parents[3] / "shared" / "data")).resolve()
CLOCK = SystemClock()


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets are not here; LOANMESH_DATA names their folder")
async def test_all_firms_are_decided_once_whoever_is_killed(mesh: Mesh, client: Client) -> None:
    firms = read_firms(DATA)
    await teach(mesh.parts["sandbox"].address, DATA)
    await set_fault(mesh, "*", latency_ms=100)
    console = Console(quiet=True)
    work = asyncio.create_task(decide_firms(console, client, firms, 50_000_000, 12, CLOCK))
    for name in START_ORDER:
        before = mesh.parts[name].restarts
        mesh.kill(name)
        while mesh.parts[name].restarts == before:
            await CLOCK.sleep(0.05)
    first = await work
    assert len({a.name for a in first.values()}) == len(firms) == 302
    assert {a.state for a in first.values()} == {pb.Application.STATE_DECIDED}
    histories = await asyncio.gather(*(client.history(a.name) for a in first.values()))
    assert all(h.chain_intact and sum(e.kind == "decided" for e in h.events) == 1 for h in histories)
    assert await decide_firms(console, client, firms, 50_000_000, 12, CLOCK) == first
