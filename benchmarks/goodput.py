"""Goodput against offered load, ours and the plain mesh, each from half to ten times its own peak.

Goodput: acknowledged within the caller's deadline of 2 s, and decided in the end. Arrivals are open loop, from the
same generator, on subjects whose evidence is cached. After each step of ours we wait until everything that was
acknowledged is decided; that wait is part of what is shown.
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
from benchmarks.naive.mesh import plain_mesh
from lab.population import Population
from loanmesh.client import Client
from loanmesh.runtime.clock import new_request_id

FACTORS = (0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
SUBJECTS = 300
DRAINED_WITHIN_S = 300.0


@dataclass(frozen=True)
class Step:
    """One offered load and what came of it."""

    factor: float
    report: Mapping[str, Any]
    """As lab.traffic reports it."""
    drain_s: float = 0.0
    """From the last arrival's answer until all were decided."""

    @property
    def goodput(self) -> float:
        """In time and decided, a second."""
        return float(self.report["all"]["in_time_a_second"])


async def measure(bench: Bench) -> Found:
    """Ours, then the plain mesh with retries and without."""
    found = {"loanmesh": await _ours(bench)}
    for name, tries in (("plain grpc.aio, 3 tries", 3), ("plain grpc.aio, no retries", 1))[: bench.size(2, 1)]:
        found[name] = await _plain(bench, tries)
        bench.say(f"goodput: {name} done")
    peaks = {name: max(step.goodput for step in steps) for name, steps in found.items()}
    _draw(bench, found, peaks)
    return Found(
        rows=_rows(found, peaks),
        markdown=[_table(found, peaks)],
        measured={name: [vars(step) for step in steps] for name, steps in found.items()},
    )


async def _steps(bench: Bench, peak: float, run: Callable[[float], Awaitable[tuple[Any, float]]]) -> list[Step]:
    steps = []
    for factor in FACTORS if not bench.quick else (0.5, 3.0):
        report, drain_s = await run(factor * peak)
        steps.append(Step(factor, report, drain_s))
    return steps


async def _ours(bench: Bench) -> list[Step]:
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
                {}, bench.size(3000, 200), IN_FLIGHT, lambda n: caller(n).submit(prepared[n % 100]), clock
            )
        await ours.all_decided(client, clock, DRAINED_WITHIN_S)

        async def run(rate: float) -> tuple[Any, float]:
            played = await traffic(bench, address, rate=rate, seconds=seconds, subjects=SUBJECTS)
            started = clock.monotonic()
            await ours.all_decided(client, clock, DRAINED_WITHIN_S)
            bench.say(f"goodput: ours at {rate:.0f}/s done")
            return played.report, clock.monotonic() - started

        return await _steps(bench, probe.a_second, run)


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


def _rows(found: Mapping[str, list[Step]], peaks: Mapping[str, float]) -> list[Row]:
    limits = {3.0: 0.95, 10.0: 0.90}
    rows = []
    for name, steps in found.items():
        for step in steps:
            if step.factor in limits:
                what = f"goodput at {step.factor:g}x offered / own peak, {name}"
                share = step.goodput / peaks[name]
                # The rivals' shares stand beside ours; nothing is asked of them.
                asked = name == "loanmesh"
                rows.append(at_least(what, share, "ratio", limits[step.factor]) if asked else Row(what, share, "ratio"))
    return rows


def _table(found: Mapping[str, list[Step]], peaks: Mapping[str, float]) -> str:
    return table(
        ("", "offered / peak", "offered a second", "goodput a second", "of own peak", "p50 ms", "p99 ms", "not in time",
         "all decided after", "generator late p99 ms"),
        [
            (
                name,
                f"{step.factor:g}",
                figure(said["offered_a_second"]),
                figure(step.goodput),
                f"{step.goodput / peaks[name]:.0%}",
                figure(said["p50_ms"] or 0),
                figure(said["p99_ms"] or 0),
                said["offered"] - said["in_time"],
                f"{step.drain_s:.1f} s" if name == "loanmesh" else "",
                figure(said["generator_late_p99_ms"]),
            )
            for name, steps in found.items()
            for step in steps
            for said in [step.report["all"]]
        ],
    )  # fmt: skip


def _draw(bench: Bench, found: Mapping[str, list[Step]], peaks: Mapping[str, float]) -> None:
    factors = [step.factor for step in found["loanmesh"]]
    pictures.lines(
        bench.pictures / "goodput.svg",
        "Acknowledged within 2 s and decided in the end, by offered load",
        ("offered load, times own peak", "goodput, share of own peak"),
        [
            pictures.Line(name, factors, [step.goodput / peaks[name] for step in steps], ours=name == "loanmesh")
            for name, steps in found.items()
        ],
        log=(True, False),
        ticks=factors,
    )
    pictures.lines(
        bench.pictures / "latency.svg",
        "Time to an acknowledgement, 99th percentile, by offered load",
        ("offered load, times own peak", "ms, from the intended send time"),
        [
            pictures.Line(name, factors, [step.report["all"]["p99_ms"] or 1 for step in steps], ours=name == "loanmesh")
            for name, steps in found.items()
        ],
        log=(True, True),
        ticks=factors,
        level=("the caller's deadline", DEADLINE_S * 1000),
    )
