"""What one application costs and how many a second, beside a bare chain: the same number of hops with nothing in them.

The chain is four empty unary services. Cold, its second one asks five more at once, as bureau asks five sources; those
five, like our sandbox, play the outside world: they run beside the generator and are not counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from benchmarks import ours
from benchmarks.bench import Bench, Found, at_least, at_most, figure, table
from benchmarks.hop import METHOD
from benchmarks.load import Measured, closed_loop, median, metered
from benchmarks.machine import child
from lab.population import Population
from loanmesh.client import Client

IN_FLIGHT = 64
Call = Callable[[int], Awaitable[object]]


@asynccontextmanager
async def bare_chain(bench: Bench, fan_out: int = 0, hops: int = 4) -> AsyncIterator[tuple[dict[str, int], Call]]:
    """Empty services in a row, the second with `fan_out` more behind it; process ids of the row, and a call."""
    async with AsyncExitStack() as stack:

        async def hop(addresses: list[str], cores: frozenset[int]) -> tuple[int, str]:
            started = child("-m", "benchmarks.hop", ",".join(addresses), cores=cores)
            process, address = await stack.enter_async_context(started)
            return process.pid, address

        leaves = [(await hop([], bench.cores.outside))[1] for _ in range(fan_out)]
        row: dict[str, int] = {}
        behind: list[str] = []
        for number in range(hops, 0, -1):
            pid, address = await hop(behind + (leaves if number == 2 else []), bench.cores.services)
            row[f"hop {number}"], behind = pid, [address]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(behind[0]))
        ask = channel.unary_unary(METHOD, Empty.SerializeToString, Empty.FromString)

        async def call(_: int) -> None:
            await ask(Empty())

        yield row, call


async def measure(bench: Bench) -> Found:
    """Deciding and accepting, in rounds that take turns with the bare chain's."""
    rounds = await _deciding(bench) | await _accepting(bench)
    found = {name: median(taken) for name, taken in rounds.items()}
    return Found(
        rows=list(_rows(found)),
        markdown=[_table(found)],
        measured={name: asdict(one) for name, one in found.items()},
    )


async def _deciding(bench: Bench) -> dict[str, list[Measured]]:
    count, calls, alone = bench.size(1000, 60), bench.size(2000, 200), bench.size(200, 10)
    population, clock = Population(bench.seed), bench.clock
    found: dict[str, list[Measured]] = {}
    async with (
        ours.our_mesh(bench) as mesh,
        Client(mesh.parts["intake"].address) as client,
        bare_chain(bench) as (row, bare),
        bare_chain(bench, fan_out=5) as (fan_row, bare_cold),
    ):
        services = ours.pids(mesh)

        async def turn(name: str, of: Mapping[str, int], items: int, in_flight: int, one: Call) -> None:
            found.setdefault(name, []).append(await closed_loop(of, items, in_flight, one, clock))

        for number in range(bench.size(3, 1)):
            prepared = ours.prepare(population, number * count, count, clock)

            async def decide(index: int) -> None:
                await ours.decide(client, prepared[index % len(prepared)])  # noqa: B023  Awaited within the round.

            await turn("bare chain", row, calls, IN_FLIGHT, bare)
            await turn("bare chain, cold", fan_row, calls // 2, IN_FLIGHT, bare_cold)
            await turn("one by one, cold", services, count, IN_FLIGHT, decide)
            await turn("one by one, warm", services, count, IN_FLIGHT, decide)
            many = prepared * 3
            with metered(services, len(many), clock) as batch:
                await ours.decide_many(client, many, clock)
            found.setdefault("by submit_many, warm", []).append(batch)
            await turn("bare chain, alone", row, alone, 1, bare)
            await turn("one alone, warm", services, alone, 1, decide)
            bench.say(f"core: round {number + 1} done")
    return found


async def _accepting(bench: Bench) -> dict[str, list[Measured]]:
    """Durable accepts with deciding deferred: the intake that accepts is told to leave deciding to others."""
    count, clock = bench.size(4000, 200), bench.clock
    found: dict[str, list[Measured]] = {}
    async with (
        ours.our_mesh(bench, INTAKE_WORK__DECIDES="false") as mesh,
        Client(mesh.parts["intake"].address) as client,
        bare_chain(bench, hops=1) as (row, bare),
    ):
        services = {"intake": ours.pids(mesh)["intake"]}
        prepared = ours.prepare(Population(bench.seed), 0, 100, clock)

        async def accept(index: int) -> None:
            await client.submit(prepared[index % len(prepared)])

        for number in range(bench.size(3, 1)):
            hop = await closed_loop(row, count, IN_FLIGHT, bare, clock)
            one_by_one = await closed_loop(services, count, IN_FLIGHT, accept, clock)
            many = prepared * (count // len(prepared))
            with metered(services, len(many), clock) as batch:
                acknowledged = await ours.submit_many(client, many)
            assert acknowledged == len(many), f"{len(many) - acknowledged} were not acknowledged"
            for name, one in (("bare hop", hop), ("accepts one by one", one_by_one), ("accepts by submit_many", batch)):
                found.setdefault(name, []).append(one)
            bench.say(f"core: accepting, round {number + 1} done")
    return found


def _rows(found: Mapping[str, Measured]) -> list[Any]:
    bare, bare_cold, hop = found["bare chain"], found["bare chain, cold"], found["bare hop"]
    warm, cold, many = found["one by one, warm"], found["one by one, cold"], found["by submit_many, warm"]
    alone, bare_alone = found["one alone, warm"].p50_ms, found["bare chain, alone"].p50_ms
    assert alone
    assert bare_alone
    cpu = "server CPU a decided application / bare chain's"
    rate = "decided a second / bare chain's calls"
    accepts = "durable accepts a second / one bare hop's calls"
    return [
        at_most(f"{cpu}, one by one, warm", warm.all_cpu_ms / bare.all_cpu_ms, "ratio", 0.6),
        at_most(f"{cpu}, one by one, cold", cold.all_cpu_ms / bare_cold.all_cpu_ms, "ratio", 1.0),
        at_most(f"{cpu}, by submit_many, warm", many.all_cpu_ms / bare.all_cpu_ms, "ratio", 0.25),
        at_least(f"{rate}, one by one, warm", warm.a_second / bare.a_second, "ratio", 1.7),
        at_least(f"{rate}, by submit_many, warm", many.a_second / bare.a_second, "ratio", 4),
        at_least(f"{accepts}, one by one", found["accepts one by one"].a_second / hop.a_second, "ratio", 0.5),
        at_least(f"{accepts}, by submit_many", found["accepts by submit_many"].a_second / hop.a_second, "ratio", 2),
        at_most("p50 with one in flight, decision included / bare chain's", alone / bare_alone, "ratio", 2),
    ]


def _table(found: Mapping[str, Measured]) -> str:
    return table(
        ("", "a second", "p50 ms", "p99 ms", "server CPU ms each", "of which", "generator busy"),
        [
            (
                name,
                figure(one.a_second),
                figure(one.p50_ms) if one.p50_ms else "",
                figure(one.p99_ms) if one.p99_ms else "",
                figure(one.all_cpu_ms),
                ", ".join(f"{part} {figure(ms)}" for part, ms in one.cpu_ms.items()) if len(one.cpu_ms) > 1 else "",
                f"{one.generator_busy:.0%}",
            )
            for name, one in found.items()
        ],
    )
