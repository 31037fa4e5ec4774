"""Traffic: many small clients that send applications when they are due, whatever became of the ones before.

    python -m lab.traffic 127.0.0.1:7401 --shape promotion --rate 200 --seconds 60 --json

Open loop: when the mesh slows down, arrivals do not. Latency counts from the moment an application was *meant* to be
sent, so a stall is felt by all who would have come during it, the generator's own stalls too. Applications are made
before the first is due. The same seed gives the same arrivals. Bounded in time (--seconds, then --deadline), in count
(--count-max) and in memory (--in-flight-max); what a bound holds back is counted as failed, under its name.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from google.protobuf import json_format
from lending.intake.v1.intake_service_pb2 import Application, Priority

from lab.population import Population
from loanmesh.client import CallFailed, Client, Unreachable
from loanmesh.runtime.clock import Clock, SystemClock

CLASSES = {
    "interactive": Priority.PRIORITY_INTERACTIVE,
    "partner": Priority.PRIORITY_PARTNER,
    "bulk": Priority.PRIORITY_BULK,
}
OK = "acknowledged"
BURST_MAX = 32
"""Arrivals sent without letting others run, when many are due at once."""

# --- When: rates and arrivals (pure) ---

Rate = Callable[[float], float]
"""Arrivals a second, at so many seconds from the start."""


def steady(rate: float) -> Rate:
    """The same rate all the time."""
    return lambda _: rate


def steps(rates: Sequence[float], each_s: float) -> Rate:
    """One rate after another, each for `each_s`; the last one goes on."""
    return lambda at_s: rates[min(len(rates) - 1, int(at_s / each_s))]


def ramp(first: float, last: float, seconds: float) -> Rate:
    """From one rate to another in a straight line; then it stays."""
    return lambda at_s: first + (last - first) * min(1.0, at_s / seconds)


def spike(rate: float, factor: float, from_s: float, for_s: float) -> Rate:
    """A steady rate that is `factor` times as high for a while."""
    return lambda at_s: rate * factor if from_s <= at_s < from_s + for_s else rate


def promotion_day(rate: float, factor: float, seconds: float) -> Rate:
    """A day in `seconds`: quiet night, rising morning, and at the stroke of 20:00 `factor` times the rate, fading.

    The shares of the hours are our own assumption; what is tried is the shape: no warning, and then everybody.
    """
    hours = (0.3, 0.2, 0.1, 0.1, 0.1, 0.2, 0.4, 0.7, 0.9, 1.0, 1.0, 1.1, 1.2, 1.1, 1.0, 1.0, 1.0, 1.1, 1.2, 1.4)
    evening = (factor, factor / 2, factor / 4, 1.0)
    return steps([rate * share for share in (*hours, *evening)], seconds / 24)


@dataclass(frozen=True)
class Arrival:
    """One application's time to be sent, seconds from the start, and its class."""

    at_s: float
    kind: str


def arrivals(
    rate: Rate, seconds: float, mix: Mapping[str, float], dice: random.Random, count_max: int = 1_000_000
) -> list[Arrival]:
    """A Poisson process of that rate for so long, in order; ends early at `count_max`.

    mix  weight of each class. Raises ValueError for an unknown class or weights that are not positive.
    """
    if unknown := set(mix) - set(CLASSES):
        raise ValueError(f"unknown class {', '.join(sorted(unknown))}; known are {', '.join(CLASSES)}")
    if not mix or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise ValueError("a mix needs weights that are not negative, one of them positive")
    kinds, weights = list(mix), list(mix.values())
    found: list[Arrival] = []
    for at_s in _times(rate, seconds, dice):
        if len(found) == count_max:
            break
        found.append(Arrival(at_s, kinds[0] if len(kinds) == 1 else dice.choices(kinds, weights)[0]))
    return found


def _times(rate: Rate, seconds: float, dice: random.Random) -> Iterator[float]:
    """Thinning (Lewis and Shedler, 1979): draw at the highest rate, keep each with the chance that its own rate has."""
    highest = max(rate(seconds * i / 1000) for i in range(1001))
    at_s = 0.0
    while highest > 0:
        at_s += dice.expovariate(highest)
        if at_s >= seconds:
            return
        if dice.random() * highest < rate(at_s):
            yield at_s


# --- What came of it ---


@dataclass(frozen=True)
class Answer:
    """What a client was told: `outcome` is `acknowledged` or why not."""

    outcome: str
    name: str = ""
    estimate_at: float | None = None
    """When it will be decided, as estimated, seconds since 1970; None where it is decided already."""


@dataclass(frozen=True)
class Record:
    """What became of one arrival. Both times count from when it was meant to be sent, seconds."""

    at_s: float
    kind: str
    late_s: float
    """How late the generator sent it."""
    took_s: float
    """Until the answer."""
    answer: Answer


Send = Callable[[int, Arrival], Awaitable[Answer]]


async def play(due: Sequence[Arrival], send: Send, clock: Clock, in_flight_max: int = 20_000) -> list[Record]:
    """Send each when it is due, whatever became of the ones before; the records, in the order of arrival.

    send  is called with the arrival's number; it must not raise.
    """
    records: list[Record | None] = [None] * len(due)
    under_way: set[asyncio.Task[None]] = set()
    start = clock.monotonic()

    async def one(number: int, arrival: Arrival) -> None:
        begun = clock.monotonic() - start
        answer = await send(number, arrival)
        took_s = clock.monotonic() - start - arrival.at_s
        records[number] = Record(arrival.at_s, arrival.kind, begun - arrival.at_s, took_s, answer)

    for number, arrival in enumerate(due):
        early_s = arrival.at_s - (clock.monotonic() - start)
        if early_s > 0:
            await clock.sleep(early_s)
        elif number % BURST_MAX == 0:
            await clock.sleep(0)
        if len(under_way) >= in_flight_max:
            late_s = clock.monotonic() - start - arrival.at_s
            records[number] = Record(arrival.at_s, arrival.kind, late_s, late_s, Answer("generator_full"))
            continue
        task = asyncio.create_task(one(number, arrival))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
    while under_way:
        await asyncio.gather(*under_way)
    return [record for record in records if record is not None]


@dataclass(frozen=True)
class Summary:
    """A run in figures. Rates are a second; latencies, ms, are those of acknowledged ones, from the intended time."""

    offered: int
    offered_a_second: float
    acknowledged: int
    in_time: int
    """Acknowledged within the deadline."""
    in_time_a_second: float
    """Those of them that were answered while applications still arrived: what the mesh kept up, without the tail."""
    failed: dict[str, int] = field(default_factory=dict)
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    generator_late_p99_ms: float = 0.0
    """How late the generator itself was; where this is not small, it was the limit, not the mesh."""


def summarise(records: Sequence[Record], seconds: float, deadline_s: float) -> Summary:
    """Figures of some records of a run in which applications arrived for `seconds`."""
    acknowledged = [r for r in records if r.answer.outcome == OK]
    took = sorted(r.took_s for r in acknowledged)
    in_time = [r for r in acknowledged if r.took_s <= deadline_s]
    failed = Counter(r.answer.outcome for r in records if r.answer.outcome != OK)
    return Summary(
        offered=len(records),
        offered_a_second=len(records) / seconds,
        acknowledged=len(took),
        in_time=len(in_time),
        in_time_a_second=sum(1 for r in in_time if r.at_s + r.took_s <= seconds) / seconds,
        failed=dict(failed.most_common()),
        p50_ms=_ms(took, 0.5),
        p90_ms=_ms(took, 0.9),
        p99_ms=_ms(took, 0.99),
        max_ms=_ms(took, 1.0),
        generator_late_p99_ms=_ms(sorted(r.late_s for r in records), 0.99) or 0.0,
    )


def _ms(ordered: Sequence[float], share: float) -> float | None:
    """The smallest of the values that so large a share does not exceed, in ms."""
    return round(ordered[max(0, -int(-share * len(ordered) // 1) - 1)] * 1000, 2) if ordered else None


def timeline(records: Sequence[Record], deadline_s: float, each_s: float = 1.0) -> list[dict[str, float]]:
    """By the second in which they were meant to be sent: offered, acknowledged in time, failed or late."""
    slots = int(max((r.at_s for r in records), default=0) / each_s) + 1 if records else 0
    found = [{"at_s": i * each_s, "offered": 0.0, "in_time": 0.0, "not": 0.0} for i in range(slots)]
    for record in records:
        slot = found[int(record.at_s / each_s)]
        good = record.answer.outcome == OK and record.took_s <= deadline_s
        slot["offered"] += 1
        slot["in_time" if good else "not"] += 1
    return found


def report(records: Sequence[Record], seconds: float, deadline_s: float) -> dict[str, Any]:
    """Everything about a run, ready for JSON: in all, by class, by second."""
    kinds = dict.fromkeys(r.kind for r in records)
    return {
        "all": asdict(summarise(records, seconds, deadline_s)),
        "by_class": {
            kind: asdict(summarise([r for r in records if r.kind == kind], seconds, deadline_s)) for kind in kinds
        },
        "timeline": timeline(records, deadline_s),
    }


# --- The clients ---


def prepare(asked: argparse.Namespace, population: Population, clock: Clock) -> dict[str, list[Application]]:
    """Applications of the subjects asked for, by class: every third subject is a firm."""
    made: dict[str, list[Application]] = {kind: [] for kind in asked.mix}
    first, count = asked.first_subject, asked.subjects
    for index in range(first, first + count):
        read = population.application("firm" if index % 3 == 2 else "person", index, clock.now())
        application = json_format.ParseDict(read, Application())
        for kind in asked.mix:
            one = Application()
            one.CopyFrom(application)
            one.priority = CLASSES[kind]
            made[kind].append(one)
    return made


def sender(clients: Sequence[Client], prepared: Mapping[str, Sequence[Application]]) -> Send:
    """Sends with one client after another."""

    async def send(number: int, arrival: Arrival) -> Answer:
        applications = prepared[arrival.kind]
        try:
            stored = await clients[number % len(clients)].submit(applications[number % len(applications)])
        except CallFailed as error:
            return Answer(error.code)
        except Unreachable as error:
            return Answer(type(error).__name__.lower())
        estimate_at = stored.estimate_time.ToNanoseconds() / 1e9 if stored.HasField("estimate_time") else None
        return Answer(OK, stored.name, estimate_at)

    return send


SHAPES: dict[str, Callable[[argparse.Namespace], Rate]] = {
    "steady": lambda a: steady(a.rate),
    "steps": lambda a: steps([a.rate * step for step in a.steps], a.seconds / len(a.steps)),
    "ramp": lambda a: ramp(a.rate, a.rate * a.factor, a.seconds),
    "spike": lambda a: spike(a.rate, a.factor, a.spike_at_s, a.spike_s),
    "promotion": lambda a: promotion_day(a.rate, a.factor, a.seconds),
}


def options(description: str) -> argparse.ArgumentParser:
    """The command line, for this generator and for others that play the same arrivals."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="where to send to, host:port")
    parser.add_argument("--shape", choices=SHAPES, default="steady")
    parser.add_argument("--rate", type=float, default=50.0, help="arrivals a second, before any factor")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long applications arrive")
    parser.add_argument("--factor", type=float, default=10.0, help="height of ramp, spike or promotion over the rate")
    parser.add_argument("--steps", type=_numbers, default=(0.5, 1, 2, 3, 5, 10), help="of steps: factors of the rate")
    parser.add_argument("--spike-at-s", type=float, default=5.0)
    parser.add_argument("--spike-s", type=float, default=20.0)
    parser.add_argument("--mix", type=_mix, default={"interactive": 1.0}, help="e.g. interactive=1,partner=2,bulk=7")
    parser.add_argument("--clients", type=int, default=20, help="how many clients share the traffic")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="how long a caller waits for its acknowledgement")
    parser.add_argument("--subjects", type=int, default=1000, help="how many different subjects apply")
    parser.add_argument("--first-subject", type=int, default=0)
    parser.add_argument(
        "--begin-at",
        type=float,
        default=0.0,
        help="Unix time from which to count, so that several generators begin"
        " together; one that is not ready by then begins when it is",
    )
    parser.add_argument("--count-max", type=int, default=200_000)
    parser.add_argument("--in-flight-max", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--records", type=Path, help="file for one JSON line an arrival")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _mix(text: str) -> dict[str, float]:
    return {name: float(weight) for name, _, weight in (part.partition("=") for part in text.split(","))}


def due(asked: argparse.Namespace) -> list[Arrival]:
    """The arrivals that the command line asks for."""
    rate = SHAPES[asked.shape](asked)
    return arrivals(rate, asked.seconds, asked.mix, random.Random(asked.seed), asked.count_max)


def publish(records: Sequence[Record], asked: argparse.Namespace) -> None:
    """Print the report; write the records where asked."""
    found = {"seed": asked.seed, **report(records, asked.seconds, asked.deadline_s)}
    if asked.records:
        lines = (json.dumps(asdict(record)) + "\n" for record in records)
        asked.records.write_text("".join(lines), encoding="utf-8")
    if asked.json:
        print(json.dumps(found))
        return
    for kind, one in {"all": found["all"], **found["by_class"]}.items():
        print(
            f"{kind:12} offered {one['offered_a_second']:8.1f}/s  in time {one['in_time_a_second']:8.1f}/s"
            f"  p50 {one['p50_ms'] or 0:8.1f} ms  p99 {one['p99_ms'] or 0:8.1f} ms  failed {one['failed'] or 0}"
        )
    print(f"generator late, p99: {found['all']['generator_late_p99_ms']:.1f} ms; seed {asked.seed}")


async def run(asked: argparse.Namespace, clock: Clock) -> list[Record]:
    """Make the applications, connect the clients, play the arrivals."""
    arriving = due(asked)
    prepared = prepare(asked, Population(), clock)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                Client(asked.address, client_id=f"traffic-{number}", patience_s=asked.deadline_s)
            )
            for number in range(asked.clients)
        ]
        # Connect before the first is due. A mesh that is away is no reason not to send: it is what callers would do.
        await asyncio.gather(*(client.list(page_size=1) for client in clients), return_exceptions=True)
        await begin(asked, clock)
        return await play(arriving, sender(clients, prepared), clock, asked.in_flight_max)


async def begin(asked: argparse.Namespace, clock: Clock) -> None:
    """Everything is made: wait until it is time."""
    settle_memory()
    early_s = asked.begin_at - clock.now().timestamp()
    if asked.begin_at and early_s < 0:
        print(f"ready {-early_s:.1f} s after --begin-at: begins now", file=sys.stderr)
    await clock.sleep(max(0.0, early_s))


def settle_memory() -> None:
    """Take what was made so far out of the collector's sight: its rounds would count as the mesh's latency."""
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run from the command line."""
    asked = options(__doc__ or "").parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        publish(runner.run(run(asked, SystemClock())), asked)


if __name__ == "__main__":
    main()
