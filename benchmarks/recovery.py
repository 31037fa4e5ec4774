"""What happens after the trouble is over: a spike, a slow source, killed services, each under steady traffic.

Systems that queue and retry can stay down after the cause is gone, kept there by their own retries (a metastable
failure). Here goodput counts only what is acknowledged in time *and decided within two seconds*, so that it comes back
only when the backlog is worked off: within 5 s and backlog / capacity left over from the steady traffic. Nobody
restarts or resets anything.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import ours, pictures
from benchmarks.bench import Bench, Found, Row, at_most, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.generator import DEADLINE_S, Decided, Played, decisions, traffic
from benchmarks.load import closed_loop
from benchmarks.promotion import set_fault
from lab.population import Population
from lab.traffic import OK
from loanmesh.cli.mesh import Mesh
from loanmesh.client import Client

DECIDED_WITHIN_S = 2.0
SHARE = 0.95
BEFORE_S = 5.0
LOAD = 0.5
"""Steady traffic, as a share of what can be decided."""
SLOW_MS, USUAL_MS = 1000, 100
"""A source as slow as a profile may wait, and one ten times as fast."""
WARM, COLD = 300, 20_000
"""How many subjects apply: few, so that their evidence is cached, or so many that it never is."""


@dataclass(frozen=True)
class Trigger:
    """One kind of trouble."""

    name: str
    subjects: int
    begin: Callable[[Mesh], Awaitable[None]]
    end: Callable[[Mesh], Awaitable[None]]
    spike: float = 1.0
    """Factor on the traffic while it lasts."""
    replicas: int = 1
    """Of each service."""
    after_s: int = 40
    """For how long traffic goes on after it: longer than the backlog may take."""


async def _nothing(mesh: Mesh) -> None:
    return None


async def _kill(mesh: Mesh) -> None:
    mesh.kill("scoring")


async def _kill_half(mesh: Mesh) -> None:
    for name in ours.SERVICES:
        mesh.kill(mesh.replicas[name][1].name)


async def _slow(mesh: Mesh) -> None:
    await set_fault(mesh, "tax", latency_ms=SLOW_MS)


async def _as_usual(mesh: Mesh) -> None:
    await set_fault(mesh, "tax", latency_ms=USUAL_MS)


TRIGGERS = (
    Trigger("ten times the traffic", WARM, _nothing, _nothing, spike=10 / LOAD, after_s=100),
    Trigger("a source ten times as slow", COLD, _slow, _as_usual),
    Trigger("scoring killed", WARM, _kill, _nothing),
    Trigger("half the replicas killed", WARM, _kill_half, _nothing, replicas=2),
)


@dataclass(frozen=True)
class Recovery:
    """What one trigger did."""

    trigger: str
    capacity: float
    """Decided a second without trouble."""
    rate: float
    """Steady arrivals a second."""
    backlog: int
    """Stored and not decided when the trigger ended."""
    took_s: float
    """From the trigger's end until goodput was back for good."""
    allowed_s: float
    failed: int
    goodput: list[float]
    """Share of each second's arrivals."""


async def measure(bench: Bench) -> Found:
    """One mesh a trigger."""
    found = []
    for trigger in TRIGGERS if not bench.quick else TRIGGERS[2:3]:
        found.append(await _recover(bench, trigger))
        bench.say(f"recovery: {trigger.name} done")
    lasted_s = bench.size(5, 1)
    pictures.lines(
        bench.pictures / "recovery.svg",
        "Trouble comes and goes; nobody restarts anything",
        ("seconds", "share acknowledged and decided within 2 s"),
        [
            pictures.Line(one.trigger, list(range(len(one.goodput))), one.goodput, ours=one.trigger == TRIGGERS[0].name)
            for one in found
        ],
        marked={"trouble": (BEFORE_S, BEFORE_S + lasted_s)},
    )
    return Found(_rows(found), [_table(found)], {one.trigger: vars(one) for one in found})


async def _recover(bench: Bench, trigger: Trigger) -> Recovery:
    lasts_s, after_s = bench.size(5, 1), bench.size(trigger.after_s, 6)
    async with (
        ours.our_mesh(bench, trigger.replicas) as mesh,
        Client(mesh.target("intake")) as client,
    ):
        if trigger.subjects == COLD:
            await _as_usual(mesh)
        capacity = await _capacity(bench, mesh, trigger)
        rate = LOAD * capacity
        seconds = BEFORE_S + lasts_s + after_s
        played, triggered_at = await _play(bench, mesh, trigger, rate, seconds, lasts_s)
        await ours.all_decided(client, bench.clock, 120)
        decided = await decisions(client)
    return _judge(trigger, played, decided, capacity, rate, triggered_at, lasts_s)


async def _capacity(bench: Bench, mesh: Mesh, trigger: Trigger) -> float:
    """Decided a second, one by one, with traffic of the trigger's kind."""
    count = bench.size(1000, 60)
    # Cold: subjects that the traffic does not use. Warm: twice the same, so that the second round is.
    first = COLD if trigger.subjects == COLD else 0
    prepared = ours.prepare(Population(bench.seed), first, count if first else min(count, WARM), bench.clock)

    async with ours.callers(mesh.target("intake")) as caller:

        async def decide(number: int) -> None:
            await ours.decide(caller(number), prepared[number % len(prepared)])

        measured = await closed_loop({}, count, IN_FLIGHT, decide, bench.clock)
        if not first:
            measured = await closed_loop({}, count, IN_FLIGHT, decide, bench.clock)
    return measured.a_second


async def _play(
    bench: Bench, mesh: Mesh, trigger: Trigger, rate: float, seconds: float, lasts_s: float
) -> tuple[Played, float]:
    """Steady traffic with trouble in it; the records, and when the trouble began (seconds since 1970)."""
    address = mesh.target("intake")
    subjects = trigger.subjects if trigger.subjects == WARM else int(rate * seconds * 1.1)
    playing = asyncio.create_task(
        traffic(
            bench, address, shape="spike", rate=rate, factor=trigger.spike, spike_at_s=BEFORE_S, spike_s=lasts_s,
            seconds=seconds, subjects=subjects,
        )
    )  # fmt: skip
    # The generator makes its applications first: what it sends says when it has begun.
    async with Client(address) as client:
        before = await _newest(client)
        while await _newest(client) == before and not playing.done():
            await bench.clock.sleep(0.05)
    await bench.clock.sleep(BEFORE_S)
    triggered_at = bench.clock.now().timestamp()
    await trigger.begin(mesh)
    await bench.clock.sleep(lasts_s)
    await trigger.end(mesh)
    ours.place(mesh, bench)
    return await playing, triggered_at


async def _newest(client: Client) -> str:
    page = (await client.list(page_size=1)).applications
    return page[0].name if page else ""


def _judge(
    trigger: Trigger,
    played: Played,
    decided: Mapping[str, Decided],
    capacity: float,
    rate: float,
    triggered_at: float,
    lasts_s: float,
) -> Recovery:
    ended_at = triggered_at + lasts_s
    waiting = sum(1 for one in decided.values() if one.created_at <= ended_at < one.decided_at)
    good: dict[int, list[bool]] = {}
    for record in played.records:
        one = decided.get(record.answer.name)
        quick = one is not None and one.decided_at - one.created_at <= DECIDED_WITHIN_S
        good.setdefault(int(record.at_s), []).append(quick and record.took_s <= DEADLINE_S)
    shares = [sum(good[s]) / len(good[s]) if s in good else 1.0 for s in range(max(good) + 1)]
    end_s = int(BEFORE_S + lasts_s)
    return Recovery(
        trigger=trigger.name,
        capacity=capacity,
        rate=rate,
        backlog=waiting,
        took_s=back_after_s(shares, end_s),
        allowed_s=5 + waiting / (capacity - rate),
        failed=sum(1 for record in played.records if record.answer.outcome != OK),
        goodput=shares,
    )


def back_after_s(shares: Sequence[float], end_s: int) -> float:
    """Seconds from the trouble's end to the last second that was not good enough; shares are a second each. Infinite
    where the last one was not."""
    bad = [second for second, share in enumerate(shares) if second >= end_s and share < SHARE]
    if bad and bad[-1] == len(shares) - 1:
        return math.inf
    return float(bad[-1] + 1 - end_s) if bad else 0.0


def _rows(found: list[Recovery]) -> list[Row]:
    return [
        at_most(f"recovery from {one.trigger}: time / (5 s + backlog over spare capacity)",
                one.took_s / one.allowed_s, "ratio", 1)
        for one in found
    ]  # fmt: skip


def _table(found: list[Recovery]) -> str:
    return table(
        ("trouble", "capacity a second", "steady traffic a second", "backlog at its end", "allowed", "back after",
         "not acknowledged"),
        [
            (one.trigger, figure(one.capacity), figure(one.rate), f"{one.backlog:,}", f"{one.allowed_s:.1f} s",
             f"{one.took_s:.0f} s", one.failed)
            for one in found
        ],
    )  # fmt: skip
