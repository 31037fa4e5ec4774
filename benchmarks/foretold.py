"""A promotion twice: as `loanmesh promotion simulate` foretells it, and as a real mesh on this machine has it.

    python -m benchmarks.foretold [deploy/promotions/small.yaml] [--seed N]

The file's height must be all there is of it (usual arrivals 0), and a source's quota must bound it well below what the
machine can do: what is compared is the arithmetic of the simulator, not the speed of this machine. Ends with 1 where a
prediction is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import uvloop

from benchmarks import ours
from benchmarks.bench import Bench, Row, at_most, figure, table, verdict
from benchmarks.generator import Decided, backlog, decisions, traffic
from benchmarks.machine import pin, share_out
from benchmarks.promotion import set_fault
from lab.traffic import OK
from loanmesh.client import Client
from loanmesh.promotion.capacity import read_capacity
from loanmesh.promotion.file import Promotion, read_promotion
from loanmesh.promotion.plan import make_plan
from loanmesh.promotion.simulate import replay
from loanmesh.promotion.waiting import percentiles
from loanmesh.runtime.clock import SystemClock

OFF_MAX = 0.15
REPLAYS = 9
"""Arrivals come by chance: what is foretold is what is to be expected, not one roll of the dice."""
DEADLINE_S = 20.0
"""Callers have patience: who is not acknowledged would be missing in what is compared."""
STEP_S = 0.1
"""A promotion of seconds is cut finely."""


@dataclass(frozen=True)
class Lived:
    """What is compared: of the simulator's day, or of a real one."""

    backlog_peak: float
    drain_s: float
    """From the last arrival until all were decided."""
    p50_s: float
    """From coming in to decision."""
    p99_s: float


def foretold(promotion: Promotion, seed: int) -> Lived:
    """As simulated on average, one replica of each service, as the mesh below has them."""
    capacity = read_capacity()
    plan = make_plan(promotion, capacity)
    days = []
    for number in range(REPLAYS):
        day = replay(
            promotion, capacity, plan, scaling="none", planned=False, seed=seed + number, step_s=STEP_S
        )  # fmt: skip
        assert day.drained_at_s is not None, "the simulator leaves a backlog for ever"
        drain_s = day.drained_at_s - promotion.length_s
        days.append((day.backlog_peak, drain_s, day.decided_s["p50"], day.decided_s["p99"]))
    return Lived(*(mean(figures) for figures in zip(*days, strict=True)))


async def lived(bench: Bench, promotion: Promotion) -> Lived:
    """As a real mesh lives through it. Raises AssertionError where an application is not acknowledged or decided."""
    rate = sum(channel.peak_a_second for channel in promotion.channels.values())
    classes: Counter[str] = Counter()
    for channel in promotion.channels.values():
        classes[channel.priority] += channel.peak_a_second  # type: ignore[assignment]  # Counts need not be whole.
    async with ours.our_mesh(bench) as mesh, Client(mesh.parts["intake"].address) as client:
        for source, quota in promotion.sources.items():
            await set_fault(mesh, source, quota_per_s=quota.a_second)
        played = await traffic(
            bench, mesh.parts["intake"].address, rate=rate, seconds=promotion.length_s,
            subjects=int(rate * promotion.length_s * 1.2), deadline_s=DEADLINE_S,
            mix=",".join(f"{name}={weight}" for name, weight in classes.items()),
        )  # fmt: skip
        bench.say("all sent; waiting until all are decided")
        await ours.all_decided(client, bench.clock, 60 + 20 * promotion.length_s, poll_s=0.2)
        decided = await decisions(client)
    refused = [record.answer.outcome for record in played.records if record.answer.outcome != OK]
    assert not refused, f"not acknowledged: {Counter(refused)}"
    assert len(decided) == len(played.records), f"{len(played.records)} were sent, {len(decided)} decided"
    return _measured(list(decided.values()))


def _measured(decided: list[Decided]) -> Lived:
    _, counts = backlog({str(number): one for number, one in enumerate(decided)}, each_s=STEP_S)
    waits = percentiles([(one.decided_at - one.created_at, 1.0) for one in decided])
    drain_s = max(one.decided_at for one in decided) - max(one.created_at for one in decided)
    return Lived(max(counts), drain_s, waits["p50"], waits["p99"])


def off(foretold_: float, measured: float) -> float:
    """How far a prediction is off, as a share of what was measured."""
    return abs(foretold_ - measured) / measured


def rows(said: Lived, was: Lived) -> list[Row]:
    """The verdict."""
    return [
        at_most("backlog at its peak, foretold against measured", off(said.backlog_peak, was.backlog_peak), "off",
                OFF_MAX),
        at_most("until all are decided, foretold against measured", off(said.drain_s, was.drain_s), "off", OFF_MAX),
    ]  # fmt: skip


def main() -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path("deploy/promotions/small.yaml"))
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    cores = share_out(os.sched_getaffinity(0))
    pin(os.getpid(), cores.outside)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    bench = Bench(False, asked.seed, SystemClock(), cores, Path("build"), say)
    promotion = read_promotion(asked.file)
    said = foretold(promotion, asked.seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        was = runner.run(lived(bench, promotion))
    compared = [
        ("backlog at its peak", figure(said.backlog_peak), figure(was.backlog_peak)),
        ("until all are decided, s", figure(said.drain_s), figure(was.drain_s)),
        ("time to decision, p50, s", figure(said.p50_s), figure(was.p50_s)),
        ("time to decision, p99, s", figure(said.p99_s), figure(was.p99_s)),
    ]
    found = rows(said, was)
    print(table((promotion.name, "foretold", "measured"), compared), verdict(found), sep="\n\n")
    missed = [row for row in found if not row.met]
    if missed:
        print("next: is the machine busy with something else? then again; else loanmesh/promotion/simulate.py is wrong")
        return 1
    print("next: loanmesh promotion simulate deploy/promotions/double-twelve.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
