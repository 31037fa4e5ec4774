"""Our mesh under the benchmark: started on its cores with telemetry on, and spoken to through the client library."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

from google.protobuf import json_format
from lending.intake.v1.intake_service_pb2 import Application

from benchmarks.bench import Bench
from benchmarks.generator import CLIENTS
from benchmarks.machine import child, pin
from lab.population import Population
from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client, Submitted
from loanmesh.runtime.clock import Clock

SERVICES = ("intake", "bureau", "scoring", "pricing")
POLL_S = 0.05
DECIDED_WITHIN_S = 120.0


@asynccontextmanager
async def our_mesh(bench: Bench, replicas: int = 1, /, **environment: str) -> AsyncIterator[Mesh]:
    """A fresh mesh on SQLite; `environment` holds settings, e.g. INTAKE_LEASE__POLL_S="0.1"."""
    async with child("-m", "benchmarks.receiver", cores=bench.cores.outside) as (_, receiver):
        telemetry = {f"{name.upper()}_TELEMETRY__OTLP_ENDPOINT": receiver for name in SERVICES}
        # Until the end, so that a part that is started again gets the same.
        with tempfile.TemporaryDirectory() as folder, _set(telemetry | environment):
            wanted = dict.fromkeys(SERVICES, replicas)
            mesh = Mesh(Path(folder), None, free_ports(), bench.clock, bench.say, replicas=wanted)
            try:
                await mesh.start()
                place(mesh, bench)
                yield mesh
            finally:
                await mesh.stop()


def place(mesh: Mesh, bench: Bench) -> None:
    """Put each part that runs on its cores; again after one was started again."""
    for name, parts in mesh.replicas.items():
        for part in parts:
            if part.process and part.process.returncode is None:
                pin(part.process.pid, bench.cores.services if name in SERVICES else bench.cores.outside)


@contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _pid(mesh: Mesh, name: str) -> int:
    process = mesh.parts[name].process
    assert process
    return process.pid


def pids(mesh: Mesh) -> dict[str, int]:
    """Process ids of the four services, by name."""
    return {name: _pid(mesh, name) for name in SERVICES}


def prepare(population: Population, first: int, count: int, clock: Clock) -> list[Application]:
    """Applications of persons first to first + count - 1."""
    return [
        json_format.ParseDict(population.application("person", index, clock.now()), Application())
        for index in range(first, first + count)
    ]


@asynccontextmanager
async def callers(address: str) -> AsyncIterator[Callable[[int], Client]]:
    """As many clients as the generator's traffic has, by number: what is a peak for one that shares calls among all it
    sends is none for many small ones."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for _ in range(CLIENTS)]
        yield lambda number: clients[number % CLIENTS]


async def decide(client: Client, application: Application) -> None:
    """Submit one and wait for its decision. Raises AssertionError where there is none."""
    answer = await client.submit(application, wait_s=20)
    assert answer.HasField("decision"), f"not decided: {list(answer.waiting_for)}"


async def submit_many(client: Client, applications: Sequence[Application]) -> int:
    """Submit all at full speed; how many were acknowledged."""
    return sum([isinstance(result, Submitted) async for result in client.submit_many(applications)])


async def decide_many(client: Client, applications: Sequence[Application], clock: Clock) -> None:
    """Submit all in batches and wait until the last is decided. Raises AssertionError where one is not taken."""
    acknowledged = await submit_many(client, applications)
    assert acknowledged == len(applications), f"{len(applications) - acknowledged} were not acknowledged"
    await all_decided(client, clock, DECIDED_WITHIN_S)


async def all_decided(client: Client, clock: Clock, within_s: float, poll_s: float = POLL_S) -> None:
    """Wait until nothing is pending. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while (await client.list(filter="state = PENDING", page_size=1)).applications:
            await clock.sleep(poll_s)
