"""How far does it grow? The real worker, pipeline and store on virtual time, with costs as figures to be set.

    python -m lab.simulator.scale [--store postgres] [--replicas 1,2,5,10,20,50,100] [--json]

Each simulated replica is one busy core for each service; the store is one server with so many writers, each of which
takes so long for a commit and for each row. Intake is kept full at all times: accepted applications are decided by the
replica that accepted them, as in a busy mesh. What comes out is where more replicas stop to help, which is the store.

The defaults are figures of ours at 64 rows a commit on two cores of a small machine: SQLite 27,000 rows/s and 1,600
commits/s of one row; PostgreSQL, one connection, 11,000 and 900. Put your own in; the shape stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score

from lab.simulator.callers import application_bytes
from lab.simulator.database import DatabaseServer, blank
from lab.simulator.loop import EPOCH_S, NodeClock, VirtualLoop
from lab.simulator.replica import sealer
from loanmesh.runtime.database import Row, Script, Statement
from services.intake.application import New
from services.intake.dictionary import sources
from services.intake.parking import Parking
from services.intake.pipeline import Pipeline
from services.intake.ports import Case, Result
from services.intake.privacy import Privacy
from services.intake.settings import ParkingSettings
from services.intake.store import Store
from services.intake.tables import metadata
from services.intake.worker import Worker

T = TypeVar("T")
REPLICAS = (1, 2, 5, 10, 20, 50, 100)
BATCH_MAX = 64
HELD_MAX = 256
WARM_UP_S = 1.0
"""Virtual time until memory is full and all are busy."""
MEASURED_S = 1.0


@dataclass(frozen=True)
class Costs:
    """What work takes, seconds. Set them from what `make bench` says of your machine."""

    accept_s: float = 100e-6
    """Of intake's core, to accept one application."""
    intake_s: float = 100e-6
    """Of intake's core, to see one through the pipeline."""
    bureau_s: float = 80e-6
    """Of bureau's core, one profile from its cache."""
    scoring_s: float = 60e-6
    pricing_s: float = 150e-6
    batch_s: float = 500e-6
    """Of either side's core, one batch call, however many are in it."""
    wire_s: float = 300e-6
    """One way between two services; no core is busy meanwhile."""
    commit_s: float = 0.60e-3
    """Of one of the store's writers, one commit."""
    row_s: float = 28e-6
    """Of one of the store's writers, one row written or handed out."""
    writers: int = 1
    """Commits that the store makes side by side."""
    group: bool = True
    """Whether a commit carries all that waits, as our SQLite writer's does."""


STORES: Mapping[str, Costs] = {
    "sqlite": Costs(),
    "postgres": Costs(commit_s=1.04e-3, row_s=75e-6, writers=4, group=False),
}


class Core:
    """One core: does one thing after another."""

    def __init__(self, clock: NodeClock) -> None:
        self._clock = clock
        self._free_at = 0.0

    async def work(self, seconds: float) -> None:
        """Return when it is done."""
        now = self._clock.monotonic()
        self._free_at = max(now, self._free_at) + seconds
        await self._clock.sleep(self._free_at - now)


class BusyStore:
    """A Database whose commits and rows take time, on a limited number of writers."""

    def __init__(self, server: DatabaseServer, clock: NodeClock, costs: Costs) -> None:
        self._server = server
        self._clock = clock
        self._costs = costs
        self._waiting: deque[tuple[Callable[[], Script[Any]], asyncio.Future[Any]]] = deque()
        self._free = costs.writers
        self._tasks: set[asyncio.Task[None]] = set()
        self.busy_s = 0.0

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((script, future))
        if self._free:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._write())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read committed rows; takes none of the writers."""
        return self._server.read_now(sql, params)

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """As `read`."""
        return await self.read(sql, params)

    async def close(self) -> None:
        """Nothing is held open."""

    async def _write(self) -> None:
        while self._waiting:
            jobs = [self._waiting.popleft() for _ in range(len(self._waiting) if self._costs.group else 1)]
            rows = 0
            answers = []
            for script, future in jobs:
                value, count = self._perform(script)
                rows += count
                answers.append((future, value))
            took_s = self._costs.commit_s + rows * self._costs.row_s
            self.busy_s += took_s
            await self._clock.sleep(took_s)
            for future, value in answers:
                if not future.done():
                    future.set_result(value)
        self._free += 1

    def _perform(self, script: Callable[[], Script[T]]) -> tuple[T, int]:
        touched = 0

        def counted() -> Script[T]:
            nonlocal touched
            running = script()
            try:
                statement = next(running)
                while True:
                    rows = yield statement
                    touched += _rows(statement, rows)
                    statement = running.send(rows)
            except StopIteration as end:
                value: T = end.value
                return value

        answer: T = self._server.transact(counted)
        return answer, touched


def _rows(statement: Statement, answered: Sequence[Row]) -> int:
    """Rows written, or handed out by a claim."""
    return len(answered) if "RETURNING" in statement.sql else len(statement.rows)


class Ports:
    """Bureau, scoring and pricing that answer everything, each on a core of its own."""

    def __init__(self, intake: Core, clock: NodeClock, costs: Costs) -> None:
        self._intake = intake
        self._clock = clock
        self._costs = costs
        self._cores = {name: Core(clock) for name in ("bureau", "scoring", "pricing")}

    async def gather(self, cases: Sequence[Case]) -> list[CreditProfile]:
        """A profile each."""
        await self._call("bureau", len(cases), self._costs.bureau_s)
        return [CreditProfile() for _ in cases]

    async def score(self, cases: Sequence[Case]) -> list[Score]:
        """A score each."""
        await self._call("scoring", len(cases), self._costs.scoring_s)
        return [Score(pd=0.05, grade="B") for _ in cases]

    async def price(self, cases: Sequence[Case]) -> list[Pricing]:
        """An approval each."""
        await self._call("pricing", len(cases), self._costs.pricing_s)
        return [Pricing(outcome=Pricing.OUTCOME_APPROVED) for _ in cases]

    async def _call(self, service: str, count: int, each_s: float) -> None:
        costs = self._costs
        await self._intake.work(costs.batch_s + count * costs.intake_s / 3)
        await self._clock.sleep(costs.wire_s)
        await self._cores[service].work(costs.batch_s + count * each_s)
        await self._clock.sleep(costs.wire_s)


class Replica:
    """One intake, kept full, with a bureau, a scoring and a pricing of its own."""

    def __init__(self, number: int, loop: VirtualLoop, store: BusyStore, costs: Costs, decided: list[float]) -> None:
        self._clock = clock = NodeClock(loop, loop.world)
        self._costs = costs
        self._number = number
        self._core = Core(clock)
        self._decided = decided
        self._room = asyncio.Event()
        self._store = Store(store, clock, f"intake-{number}", 10.0, Privacy(sealer(clock)))
        ports = Ports(self._core, clock, costs)
        parking = Parking(ParkingSettings(), clock, random.Random(number))
        pipeline = Pipeline(
            ports,
            ports,
            ports,
            self._store,
            clock,
            random.Random(number),
            14,
            parking,
            lambda *_, **__: None,
            sources(),
        )
        self._worker = Worker(
            self._store, pipeline.decide_batch, clock, batch_max=BATCH_MAX, batches=8, held_max=HELD_MAX, lease_s=10.0,
            poll_s=0.2, settled=self._settled, report=_complain,
        )  # fmt: skip

    async def run(self) -> None:
        """Accept whatever there is room for, for ever."""
        payload = application_bytes("person", 0)
        count = 0
        while True:
            while self._worker.waiting >= HELD_MAX // 2:
                self._room.clear()
                await self._room.wait()
            new = [self._new(count + index, payload) for index in range(BATCH_MAX)]
            count += BATCH_MAX
            await self._core.work(BATCH_MAX * self._costs.accept_s)
            stored = await self._store.accept([(one, True) for one in new])
            self._worker.offer([one.claim for one in stored if one.claim])

    def _new(self, index: int, payload: bytes) -> New:
        key = f"{self._number:04d}-{index:08d}"
        return New(key, "lenders/demo", "scale", key, payload, "", 1, "app", EPOCH_S)

    def _settled(self, results: Mapping[str, Result]) -> None:
        self._decided.extend([self._clock.monotonic()] * len(results))
        self._room.set()


def _complain(event: str, **facts: Any) -> None:
    raise AssertionError(f"{event} {facts}")


class _Nobody:
    """Nothing goes wrong here that anybody had to be told of."""

    def violate(self, rule: str, application: str, text: str) -> None: ...
    def trace(self, text: str) -> None: ...
    def stored(self, application_id: str, is_free: int) -> None: ...
    def looked_at(self, application_id: str, attempts: int) -> None: ...
    def mend(self, application_id: str) -> None: ...


@dataclass(frozen=True)
class Point:
    """How many replicas decide how much."""

    replicas: int
    a_second: float
    store_busy: float
    """Share of its writers' time, in [0, 1]."""


def measure(replicas: int, costs: Costs, warm_up_s: float = WARM_UP_S, measured_s: float = MEASURED_S) -> Point:
    """Applications accepted and decided a second by so many replicas."""
    loop = VirtualLoop(random.Random(replicas))
    server = DatabaseServer("scale", blank(metadata, ""), loop, random.Random(1), _Nobody(), inline=True)
    clock = NodeClock(loop, loop.world)
    decided: list[float] = []
    store = BusyStore(server, clock, costs)

    async def main() -> float:
        loop_ = asyncio.get_running_loop()
        running = [loop_.create_task(Replica(number, loop, store, costs, decided).run()) for number in range(replicas)]
        await clock.sleep(warm_up_s)
        busy_before_s = store.busy_s
        await clock.sleep(measured_s)
        for task in running:
            task.cancel()
        return store.busy_s - busy_before_s

    loop.handles_max = sys.maxsize  # Much happens here, because there is much to do.
    busy_s = loop.run_until(loop.spawn(loop.world, main()), warm_up_s + measured_s + 1)
    loop.end()
    server.close()
    within = sum(warm_up_s <= at < warm_up_s + measured_s for at in decided)
    return Point(replicas, within / measured_s, min(1.0, busy_s / measured_s / costs.writers))


def limit_of(points: Sequence[Point]) -> Point:
    """The first point at which the store has no time left, or the last."""
    return next((point for point in points if point.store_busy > 0.95), points[-1])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lab.simulator.scale", description="How far does it grow?")
    parser.add_argument("--store", choices=list(STORES), default="postgres")
    parser.add_argument("--replicas", default=",".join(map(str, REPLICAS)))
    for name in ("accept_us", "intake_us", "bureau_us", "scoring_us", "pricing_us", "batch_us", "commit_us", "row_us"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, help="cost in microseconds")
    parser.add_argument("--writers", type=int, help="commits side by side")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    said = vars(parser.parse_args())
    given = {name[:-3] + "_s": value / 1e6 for name, value in said.items() if name.endswith("_us") and value}
    costs = replace(STORES[said["store"]], **given, **({"writers": said["writers"]} if said["writers"] else {}))
    points = [measure(int(count), costs) for count in said["replicas"].split(",")]
    rows = [
        {"name": f"decided a second, {p.replicas} replicas, {said['store']}", "value": round(p.a_second),
         "unit": "applications/s", "target": None, "met": None, "store_busy": round(p.store_busy, 3)}
        for p in points
    ]  # fmt: skip
    Path("build").mkdir(exist_ok=True)
    Path(f"build/scale-{said['store']}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if said["json"]:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'replicas':>8} {'decided/s':>10} {'a replica':>10} {'store busy':>11}")
    for p in points:
        print(f"{p.replicas:>8} {p.a_second:>10,.0f} {p.a_second / p.replicas:>10,.0f} {p.store_busy:>10.0%}")
    limit = limit_of(points)
    if limit.store_busy > 0.95:
        print(f"The store is the limit from {limit.replicas} replicas on, at {limit.a_second:,.0f} a second.")
    else:
        print("The store is not the limit yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
