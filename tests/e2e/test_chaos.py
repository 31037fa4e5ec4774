"""A short run under fire on each database: every promise holds, and every fault of the list can strike."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lab import faults
from lab.audit import pending
from lab.chaos import Plan, run, under_fire
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application

CLOCK = SystemClock()
DATABASES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.mark.parametrize("database", DATABASES)
async def test_nothing_is_lost_under_fire(database: str) -> None:
    plan = Plan(database, applications=400, faults=8, seed=int.from_bytes(os.urandom(4)))
    print(plan)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        rows = await run(plan, Path(folder), CLOCK, print)
    assert [row for row in rows if not row.met] == []


async def test_every_fault_on_sqlite_strikes_and_heals() -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        plan = Plan("sqlite", 0, 0, 0)
        async with under_fire(plan, Path(folder), CLOCK, random.Random(7)) as world:
            world.most_s = 0.5
            quick = {**faults.ON_ALL, **faults.ON_SQLITE}
            # One after the other takes long; what they strike must be there, so not all at once either.
            for name in ("rolling_restart", "wrong_clock_in_intake", "cut_connections"):
                quick.pop(name)
            done = dict(zip(quick, await asyncio.gather(*(fault(world) for fault in quick.values())), strict=True))
            assert all(done.values()), done
            await faults.heal(world)
            assert len({r.service for r in await world.mesh.replicas()}) == 5


async def test_work_goes_on_after_a_disk_was_full() -> None:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        async with under_fire(Plan("sqlite", 0, 0, 0), Path(folder), CLOCK, random.Random(7)) as world:
            front = ",".join(proxy.address for proxy in world.proxies[2:])
            # They come back to the store again and again, so that the claims fail, too.
            assert await faults.set_source(world, "*", {"dead": True})
            async with Client(front) as client:
                await asyncio.gather(*(client.submit(an_application("person", i, CLOCK.now())) for i in range(40)))
                filling = asyncio.create_task(faults.full_disk(world))
                await CLOCK.sleep(0.1)
                # Told to come again, and stored once there is room: never a false acknowledgement.
                stored = await client.submit(an_application("person", 41, CLOCK.now()))
                assert await filling
                assert await faults.set_source(world, "*", faults.HEALTHY)
                assert (await client.get(stored.name)).name == stored.name
            give_up = CLOCK.monotonic() + 60
            while left := await pending(world.database):
                assert CLOCK.monotonic() < give_up, f"{left} are stuck"
                await CLOCK.sleep(0.2)


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lab.chaos",
        "--applications",
        "100000",
        "--faults",
        "1000",
        "--database",
        "sqlite",
    ]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "chaos.json"), "--seed", "42"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr
    assert next(line for line in process.stderr if "acknowledged" in line)
    process.send_signal(signal.SIGINT)
    rest, code = process.stderr.read(), process.wait(timeout=60)
    assert code == 130
    assert "Seed 42" in rest
    assert "Traceback" not in rest
    assert not (tmp_path / "chaos.json").exists()
