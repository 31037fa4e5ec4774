"""Ten times the load, most of it bulk: do those who wait in front of a screen notice?

Interactive applications alone would fill 80 % of what the mesh can do; partners and bulk come on top. Success is an
acknowledgement within the caller's deadline of 2 s. Beside it stands how many of the interactive ones were also
decided within 2 s, which nobody promised them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import ours
from benchmarks.bench import Bench, Found, Row, at_least, at_most, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.generator import DEADLINE_S, Decided, Played, decisions, traffic
from benchmarks.load import closed_loop
from lab.population import Population
from lab.traffic import Summary, summarise
from loanmesh.client import Client

FULL = 10.0
HALF = 0.5
INTERACTIVE = 0.8
"""Of capacity."""
SUBJECTS = 300
LONGEST_DRAIN_S = 300.0
ONSET_S = 1.0
"""Until the callers have learned that the mesh is full. What comes later is shown by itself too, for a promotion lasts
for hours; the verdict is of all."""
READY_S = 12
"""Until both programs have made their applications and are connected, seconds."""


async def measure(bench: Bench) -> Found:
    """Half load, then ten times, with the same interactive traffic in proportion."""
    clock = bench.clock
    async with (
        ours.our_mesh(bench) as mesh,
        Client(mesh.parts["intake"].address) as client,
    ):
        address = mesh.parts["intake"].address
        await traffic(bench, address, rate=100, seconds=SUBJECTS / 100, subjects=SUBJECTS)  # Fills bureau's cache.
        prepared = ours.prepare(Population(bench.seed), 0, 100, clock)

        async with ours.callers(address) as caller:
            probe = await closed_loop(
                {}, bench.size(2000, 60), IN_FLIGHT, lambda n: ours.decide(caller(n), prepared[n % 100]), clock
            )
        capacity = probe.a_second
        runs: dict[float, tuple[Sequence[Played], dict[str, Decided]]] = {}
        for load in (HALF, FULL):
            interactive = INTERACTIVE * min(load, 1.0)
            seconds = bench.size(12, 2)
            # Connected by then: what a hundred new connections cost is another matter.
            begin_at = clock.now().timestamp() + bench.size(READY_S, 3)
            # Programs of their own, as an app and a batch job are.
            played = await asyncio.gather(
                traffic(
                    bench, address, rate=interactive * capacity, seconds=seconds, subjects=SUBJECTS, begin_at=begin_at
                ),
                traffic(
                    bench, address, rate=(load - interactive) * capacity, seconds=seconds, subjects=SUBJECTS,
                    mix="partner=1,bulk=4", seed=bench.seed + 1, begin_at=begin_at,
                ),
            )  # fmt: skip
            await ours.all_decided(client, clock, LONGEST_DRAIN_S, poll_s=0.5)
            runs[load] = played, await decisions(client)
            bench.say(f"priorities: {load:g}x done")
    return _judge(capacity, runs)


def _judge(capacity: float, runs: Mapping[float, tuple[Sequence[Played], Mapping[str, Decided]]]) -> Found:
    def of(load: float, kind: str) -> Mapping[str, Any]:
        return next(played.report["by_class"][kind] for played in runs[load][0] if kind in played.report["by_class"])

    def later(load: float) -> Summary:
        records = [r for one in runs[load][0] for r in one.records if r.kind == "interactive" and r.at_s >= ONSET_S]
        return summarise(records, max(r.at_s for r in records) - ONSET_S, DEADLINE_S)

    full, tails = of(FULL, "interactive"), {load: later(load).p99_ms for load in runs}
    rows = [
        at_least("interactive at 10x mixed load: acknowledged in time", full["in_time"] / full["offered"], "share",
                 0.999),
        at_most("interactive at 10x mixed load: p99 / its p99 at half load",
                (full["p99_ms"] or float("inf")) / (of(HALF, "interactive")["p99_ms"] or 1), "ratio", 3),
        Row(f"the same, of those that came after {ONSET_S:g} s",
            (tails[FULL] or float("inf")) / (tails[HALF] or 1), "ratio"),
    ]  # fmt: skip
    shown = [
        (
            f"{load:g}x",
            kind,
            figure(one["offered_a_second"]),
            f"{one['in_time'] / one['offered']:.2%}",
            f"{_decided_soon(*runs[load], kind):.2%}",
            figure(one["p50_ms"] or 0),
            figure(one["p99_ms"] or 0),
            figure(one["generator_late_p99_ms"]),
        )
        for load in runs
        for kind in ("interactive", "partner", "bulk")
        for one in [of(load, kind)]
    ]
    header = ("load", "class", "offered a second", "acknowledged in time", "decided within 2 s", "p50 ms", "p99 ms",
              "generator late p99 ms")  # fmt: skip
    told = " and ".join(f"{figure(p99_ms or 0)} ms at {load:g}x" for load, p99_ms in tails.items())
    said = (
        f"Capacity: {figure(capacity)} decided a second, one by one, warm."
        f" Interactive ones that came after {ONSET_S:g} s: p99 {told}."
    )
    return Found(
        rows,
        [said, table(header, shown)],
        {f"{load:g}x": [played.report["by_class"] for played in runs[load][0]] for load in runs},
    )


def _decided_soon(played: Sequence[Played], decided: Mapping[str, Decided], kind: str) -> float:
    """Share of a class's arrivals that were decided within the deadline."""
    records = [record for one in played for record in one.records if record.kind == kind]
    found = [decided.get(record.answer.name) for record in records]
    soon = [one for one in found if one and one.decided_at - one.created_at <= DEADLINE_S]
    return len(soon) / len(records) if records else 1.0
