"""Two replicas of each service against one, on one core and on all: what scales here, and what the cores bound.

On PostgreSQL, which any number of intakes share, and on SQLite as far as one file goes. Twice the replicas on the same
core do the same work in smaller batches; only where there are cores for them can they do more. On this many cores that
is a few processes for each core either way: growth beyond is shown by `python -m lab.simulator.scale`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import ours
from benchmarks.bench import Bench, Found, Row, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.load import Measured, closed_loop, metered
from benchmarks.machine import Cores
from benchmarks.postgres import Postgres, postgres
from lab.population import Population
from loanmesh.cli.mesh import Mesh
from loanmesh.client import Client

SUBJECTS = 200


@dataclass(frozen=True)
class Tried:
    """One mesh, both ways of submitting."""

    database: str
    cores: int
    """That services and database have; the generator has one of them too where it is all."""
    replicas: int
    one_by_one: Measured
    many: Measured


async def measure(bench: Bench) -> Found:
    """Both databases, one core and all, one replica and two."""
    everywhere = bench.cores.services | bench.cores.outside
    found: list[Tried] = []
    with postgres(everywhere) as server:
        for database, at in (("PostgreSQL", server), ("SQLite", None))[: bench.size(2, 1)]:
            for services in (bench.cores.services, everywhere)[: bench.size(2, 1)]:
                server.move_to(services)
                placed = replace(bench, cores=Cores(services, bench.cores.outside))
                for replicas in (1, 2):
                    found.append(await _tried(placed, database, at, replicas))
                    bench.say(f"replicas: {database}, {len(services)} cores, {replicas} of each done")
    return Found(_rows(found), [_table(found)], {_name(one): vars(one.one_by_one) for one in found})


async def _tried(bench: Bench, database: str, server: Postgres | None, replicas: int) -> Tried:
    count, environment = bench.size(1600, 60), {}
    if server:
        names = ("INTAKE_DATABASE_URL", "BUREAU_DATABASE_URL")
        environment = {name: await server.new_database() for name in names}
    async with ours.our_mesh(bench, replicas, **environment) as mesh, Client(mesh.target("intake")) as client:
        prepared = ours.prepare(Population(bench.seed), 0, min(count, SUBJECTS), bench.clock)
        await ours.decide_many(client, prepared, bench.clock)  # Fills bureau's cache.
        one_by_one = await closed_loop(
            _pids(mesh),
            count,
            IN_FLIGHT,
            lambda index: ours.decide(client, prepared[index % len(prepared)]),
            bench.clock,
        )
        many = (prepared * (count // len(prepared) + 1))[:count]
        with metered(_pids(mesh), count, bench.clock) as by_many:
            await ours.decide_many(client, many, bench.clock)
    return Tried(database, len(bench.cores.services), replicas, one_by_one, by_many)


def _pids(mesh: Mesh) -> dict[str, int]:
    return {
        f"{name} {number}": part.process.pid
        for name in ours.SERVICES
        for number, part in enumerate(mesh.replicas[name], 1)
        if part.process
    }


def _name(one: Tried) -> str:
    return f"{one.database}, {one.cores} cores, {one.replicas} of each"


def _rows(found: list[Tried]) -> list[Row]:
    """Told, not judged: cores decide."""
    rows = []
    for single, double in zip(found[::2], found[1::2], strict=True):
        where = f"{single.database}, {single.cores} {'core' if single.cores == 1 else 'cores'}"
        rows += [
            Row(f"two replicas / one, one by one, {where}", double.one_by_one.a_second / single.one_by_one.a_second,
                "ratio"),
            Row(f"two replicas / one, by submit_many, {where}", double.many.a_second / single.many.a_second, "ratio"),
        ]  # fmt: skip
    return rows


def _table(found: list[Tried]) -> str:
    return table(
        ("database", "cores", "of each service", "one by one a second", "p50 ms", "CPU ms each",
         "by submit_many a second", "CPU ms each"),
        [
            (one.database, one.cores, one.replicas, figure(one.one_by_one.a_second), figure(one.one_by_one.p50_ms or 0),
             figure(one.one_by_one.all_cpu_ms), figure(one.many.a_second), figure(one.many.all_cpu_ms))
            for one in found
        ],
    )  # fmt: skip
