"""What being seen costs: the same mesh with telemetry and without, in rounds that take turns.

With it, spans, metrics and logs go to a receiver on the generator's core that drops them: one new trace in twenty is
sampled, as by default. A third mesh takes every decision for late, so that every application is traced in full: what
the worst day would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict

from benchmarks import ours
from benchmarks.bench import Bench, Found, Row, at_least, at_most, figure, table
from benchmarks.load import Measured, closed_loop, median, metered
from lab.population import Population
from loanmesh.client import Client

IN_FLIGHT = 64
WITHOUT, WITH, ALL = "without", "with", "with, every application traced in full"
SETTINGS = {
    WITHOUT: {f"{name.upper()}_TELEMETRY__OTLP_ENDPOINT": "" for name in ours.SERVICES},
    WITH: {},
    ALL: {"INTAKE_TELEMETRY__SLOW_S": "0.000001"},
}
ONE_BY_ONE, MANY = "one by one", "by submit_many"


async def measure(bench: Bench) -> Found:
    """Rates and CPU of each, the median of the rounds."""
    count, calls, clock = bench.size(1000, 60), bench.size(3000, 120), bench.clock
    prepared = ours.prepare(Population(bench.seed), 0, count, clock)
    rounds: dict[tuple[str, str], list[Measured]] = {}
    async with AsyncExitStack() as stack:
        clients, services = {}, {}
        for name, settings in SETTINGS.items():
            mesh = await stack.enter_async_context(ours.our_mesh(bench, **settings))
            clients[name] = await stack.enter_async_context(Client(mesh.parts["intake"].address))
            services[name] = ours.pids(mesh)
            await ours.decide_many(clients[name], prepared, clock)  # Sources are known from here on.
        for number in range(bench.size(5, 1)):
            # The order turns, so that none is always the first after a rest.
            for name in _turned(list(SETTINGS), number):
                client = clients[name]

                async def decide(index: int) -> None:
                    await ours.decide(client, prepared[index % count])  # noqa: B023  Awaited within the round.

                one = await closed_loop(services[name], calls, IN_FLIGHT, decide, clock)
                rounds.setdefault((name, ONE_BY_ONE), []).append(one)
                many = prepared * 3
                with metered(services[name], len(many), clock) as batch:
                    await ours.decide_many(client, many, clock)
                rounds.setdefault((name, MANY), []).append(batch)
            bench.say(f"telemetry: round {number + 1} done")
    found = {key: median(taken) for key, taken in rounds.items()}
    return Found(
        rows=list(_rows(found)),
        markdown=[_table(found)],
        measured={f"{name}, {way}": asdict(one) for (name, way), one in found.items()},
    )


def _turned(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def _rows(found: dict[tuple[str, str], Measured]) -> list[Row]:
    rows = []
    for way in (ONE_BY_ONE, MANY):
        share = found[WITH, way].a_second / found[WITHOUT, way].a_second
        rows.append(at_least(f"decided a second with telemetry / without, {way}", share, "ratio", 0.95))
        cpu = found[WITH, way].all_cpu_ms / found[WITHOUT, way].all_cpu_ms
        rows.append(at_most(f"server CPU an application with telemetry / without, {way}", cpu, "ratio", 1.1))
        worst = found[ALL, way].a_second / found[WITHOUT, way].a_second
        rows.append(Row(f"decided a second, every application traced in full / without, {way}", worst, "ratio"))
    return rows


def _table(found: dict[tuple[str, str], Measured]) -> str:
    rows = [(name, way, figure(one.a_second), figure(one.all_cpu_ms)) for (name, way), one in found.items()]
    return table(("telemetry", "submitted", "decided/s", "server CPU ms an application"), rows)
