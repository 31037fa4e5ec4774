"""Goodput against offered load, ours and the plain mesh, each from half to ten times its own peak.

Goodput: acknowledged within the caller's deadline of 2 s, and decided in the end. Arrivals are open loop, from the
same generator, on subjects whose evidence is cached. After each step of ours we wait until everything that was
acknowledged is decided; that wait is part of what is shown.

With a core to itself our mesh takes more of our clients than the generator can offer threefold. So ours is measured
twice: as it is, against what its callers can submit one by one, and with neighbours that leave it a part of the core,
against the most it takes then, up to five times that: more the generator cannot offer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub

from benchmarks import ours, pictures
from benchmarks.bench import Bench, Found, Row, at_least, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.generator import DEADLINE_S, traffic
from benchmarks.load import closed_loop
from benchmarks.machine import neighbours
from benchmarks.naive.mesh import plain_mesh
from lab.population import Population
from loanmesh.client import Client
from loanmesh.runtime.clock import new_request_id

FACTORS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
SUBJECTS = 300
MOST_BESIDE = 5.0
"""The largest of them beside neighbours."""
DRAINED_WITHIN_S = 300.0
OURS, BESIDE = MESHES = ("loanmesh", "loanmesh, busy neighbours")
"""Ours; all else are rivals."""
NEIGHBOURS, NEIGHBOURS_S = 4, 1200.0
"""Processes that spin on the services' cores, and for how long at most."""
FULL_IN_FLIGHT = 1000
"""Submits that the callers have under way where it is asked what the mesh takes at most."""


@dataclass(frozen=True)
class Step:
    """One offered load and what came of it."""

    factor: float
    """Of what was found before that the callers can have done."""
    report: Mapping[str, Any]
    """As lab.traffic reports it."""
    drain_s: float = 0.0
    """From the last arrival's answer until all were decided."""

    @property
    def offered(self) -> float:
        """Arrivals a second."""
        return float(self.report["all"]["offered_a_second"])

    @property
    def goodput(self) -> float:
        """In time and decided, a second."""
        return float(self.report["all"]["in_time_a_second"])


async def measure(bench: Bench) -> Found:
    """Ours, ours beside busy neighbours, then the plain mesh with retries and without."""
    found = {OURS: await _ours(bench, IN_FLIGHT, FACTORS[-1])}
    async with neighbours(NEIGHBOURS, bench.cores.services, NEIGHBOURS_S):
        found[BESIDE] = await _ours(bench, FULL_IN_FLIGHT, MOST_BESIDE)
    for name, tries in (("plain grpc.aio, 3 tries", 3), ("plain grpc.aio, no retries", 1))[: bench.size(2, 1)]:
        found[name] = await _plain(bench, tries)
        bench.say(f"goodput: {name} done")
    peaks = {name: max(step.goodput for step in steps) for name, steps in found.items()}
    _draw(bench, found, peaks)
    return Found(
        rows=_rows(found),
        markdown=[_table(found, peaks)],
        measured={name: [vars(step) for step in steps] for name, steps in found.items()},
    )


async def _steps(
    bench: Bench, base: float, run: Callable[[float], Awaitable[tuple[Any, float]]], most: float = FACTORS[-1]
) -> list[Step]:
    steps = []
    for factor in [factor for factor in (FACTORS if not bench.quick else (0.5, 3.0)) if factor <= most]:
        report, drain_s = await run(factor * base)
        steps.append(Step(factor, report, drain_s))
    return steps


async def _ours(bench: Bench, in_flight: int, most: float) -> list[Step]:
    """Steps up to `most` times what the callers can submit with so many in flight."""
    seconds, clock = bench.size(12, 1), bench.clock
    async with (
        ours.our_mesh(bench) as mesh,
        Client(mesh.parts["intake"].address) as client,
    ):
        address = mesh.parts["intake"].address
        await traffic(bench, address, rate=100, seconds=SUBJECTS / 100, subjects=SUBJECTS)  # Fills bureau's cache.
        prepared = ours.prepare(Population(bench.seed), 0, 100, clock)
        async with ours.callers(address) as caller:
            probe = await closed_loop(
                {}, bench.size(6000, 200), in_flight, lambda n: caller(n).submit(prepared[n % 100]), clock
            )
        await ours.all_decided(client, clock, DRAINED_WITHIN_S)

        async def run(rate: float) -> tuple[Any, float]:
            played = await traffic(bench, address, rate=rate, seconds=seconds, subjects=SUBJECTS)
            started = clock.monotonic()
            await ours.all_decided(client, clock, DRAINED_WITHIN_S)
            bench.say(f"goodput: ours at {rate:.0f}/s done")
            return played.report, clock.monotonic() - started

        return await _steps(bench, probe.a_second, run, most)


async def _plain(bench: Bench, tries: int) -> list[Step]:
    seconds = bench.size(12, 1)
    async with plain_mesh(bench) as (address, _), grpc.aio.insecure_channel(address) as channel:
        module = "benchmarks.naive.traffic"
        await traffic(bench, address, module=module, rate=50, seconds=SUBJECTS / 50, subjects=SUBJECTS)
        stub = IntakeServiceStub(channel)
        prepared = ours.prepare(Population(bench.seed), 0, 100, bench.clock)

        async def decide(index: int) -> None:
            await stub.SubmitApplication(
                pb.SubmitApplicationRequest(
                    parent="lenders/demo", request_id=new_request_id(), application=prepared[index % 100]
                )
            )

        probe = await closed_loop({}, bench.size(1500, 100), IN_FLIGHT, decide, bench.clock)

        async def run(rate: float) -> tuple[Any, float]:
            played = await traffic(
                bench, address, module=module, rate=rate, seconds=seconds, subjects=SUBJECTS, tries=tries
            )
            return played.report, 0.0

        return await _steps(bench, probe.a_second, run)


def _rows(found: Mapping[str, list[Step]]) -> list[Row]:
    rows = []
    for name, steps in found.items():
        limits = {3.0: 0.95, MOST_BESIDE: 0.90} if name == BESIDE else {3.0: 0.95, 10.0: 0.90}
        for step in steps:
            if step.factor not in limits:
                continue
            # More than is offered nobody can have.
            best = max(other.goodput for other in steps if other is not step)
            share = step.goodput / min(best, step.offered)
            times = f"{step.factor:g}x what goes one by one" if name == OURS else f"{step.factor:g}x"
            what = f"goodput at {times} / best at another load, or what is offered, {name}"
            # The rivals' shares stand beside ours; nothing is asked of them.
            asked = name in MESHES
            rows.append(at_least(what, share, "ratio", limits[step.factor]) if asked else Row(what, share, "ratio"))
    return rows


def _table(found: Mapping[str, list[Step]], peaks: Mapping[str, float]) -> str:
    return table(
        ("", "offered / peak", "offered a second", "goodput a second", "of own peak", "p50 ms", "p99 ms", "not in time",
         "all decided after", "generator late p99 ms"),
        [
            (
                name,
                f"{step.offered / peaks[name]:.2g}",
                figure(said["offered_a_second"]),
                figure(step.goodput),
                f"{step.goodput / peaks[name]:.0%}",
                figure(said["p50_ms"] or 0),
                figure(said["p99_ms"] or 0),
                said["offered"] - said["in_time"],
                f"{step.drain_s:.1f} s" if name in MESHES else "",
                figure(said["generator_late_p99_ms"]),
            )
            for name, steps in found.items()
            for step in steps
            for said in [step.report["all"]]
        ],
    )  # fmt: skip


def _draw(bench: Bench, found: Mapping[str, list[Step]], peaks: Mapping[str, float]) -> None:
    def line(name: str, y: Callable[[Step], float]) -> pictures.Line:
        steps = found[name]
        x = [step.offered / peaks[name] for step in steps]
        return pictures.Line(name, x, [y(step) for step in steps], name in MESHES)

    def share(name: str) -> Callable[[Step], float]:
        return lambda step: step.goodput / peaks[name]

    pictures.lines(
        bench.pictures / "goodput.svg",
        "Acknowledged within 2 s and decided in the end, by offered load",
        ("offered load, times own peak", "goodput, share of own peak"),
        [line(name, share(name)) for name in found],
        log=(True, False),
        ticks=FACTORS,
    )
    pictures.lines(
        bench.pictures / "latency.svg",
        "Time to an acknowledgement, 99th percentile, by offered load",
        ("offered load, times own peak", "ms, from the intended send time"),
        [line(name, lambda step: step.report["all"]["p99_ms"] or 1) for name in found],
        log=(True, True),
        ticks=FACTORS,
        level=("the caller's deadline", DEADLINE_S * 1000),
    )
