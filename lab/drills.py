"""One trouble at a time, measured: at a moderate load, what do callers notice, and how soon is all well again?

Three replicas of each service. A call is one `submit` through the client library with two seconds to succeed, sent at
a steady rate whatever the answers (open loop), and counted by the time it was sent.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb

from lab.audit import pending
from lab.faults import BACK_WITHIN_S, HEALTHY, World, is_back, set_source
from lab.outside import SERVICES, Outside, Replica
from lab.population import Population
from lab.rows import Row, at_least, at_most
from loanmesh.client import CallFailed, Client, Unreachable
from loanmesh.runtime.clock import Clock

RATE = 60.0
"""Calls a second."""
DEADLINE_S = 2.0
WARM_SUBJECTS = 200
WATCH_S = 6.0
"""How long each trouble is watched."""
NEW_REPLICA_WITHIN_S = 10.0
RECOVER_WITHIN_S = 5.0
GOOD = 0.95
BUCKET_S = 0.5
THREE_EACH = "intake=3,bureau=3,scoring=3,pricing=3"
LEASE_S = 2.0


@dataclass(frozen=True)
class Call:
    """When it was sent, what it is called where it was acknowledged in time, and why it failed where it was not."""

    sent_at: float
    name: str
    why: str

    @property
    def failed(self) -> bool:
        """Not acknowledged in time."""
        return not self.name


class Steady:
    """Submits at a steady rate, and remembers each call."""

    def __init__(self, client: Client, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._population = Population()
        self._under_way: set[asyncio.Task[None]] = set()
        self.calls: list[Call] = []
        self.cold = False
        """Whether each application is of somebody new, whose sources must be asked."""

    async def flow(self) -> None:
        """Until cancelled."""
        due = self._clock.monotonic()
        number = 0
        while True:
            due += 1 / RATE
            await self._clock.sleep(max(0.0, due - self._clock.monotonic()))
            index = 1000 + number if self.cold else number % WARM_SUBJECTS
            said = self._population.application("person", index, self._clock.now())
            task = asyncio.create_task(self._one(json_format.ParseDict(said, pb.Application())))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            number += 1

    async def settle(self) -> None:
        """Until every call sent so far has ended."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _one(self, application: pb.Application) -> None:
        sent_at = self._clock.monotonic()
        name = why = ""
        try:
            name = (await self._client.submit(application, deadline_s=DEADLINE_S)).name
        except (CallFailed, Unreachable) as error:
            why = f"{type(error).__name__}: {error}"
        self.calls.append(Call(sent_at, name, why))

    def between(self, start: float, end: float) -> list[Call]:
        """Calls sent in [start, end)."""
        return [call for call in self.calls if start <= call.sent_at < end]


class Drill:
    """A mesh, a steady flow of calls to it, and the troubles."""

    def __init__(self, mesh: Outside, sandbox: str, database: str, clock: Clock, say: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._clock = clock
        self._say = say
        self._database = database
        self._world = World(mesh, sandbox, (), None, database, {}, clock, random.Random(0), LEASE_S)

    async def all(self, client: Client) -> list[Row]:
        """Every trouble in turn, with a rest between."""
        steady = Steady(client, self._clock)
        flowing = asyncio.create_task(steady.flow())
        try:
            await self._clock.sleep(2.0)
            rows = await self._noticed(steady, "one of three paused", self._pause, 0.01)
            rows += await self._noticed(steady, "one of three killed", self._kill, 0.0)
            rows += await self._noticed(steady, "rolling restart of all", self._roll, 0.0)
            rows.append(await self._new_replica(steady, client))
            rows.append(await self._recovery(steady, "half the replicas killed", self._kill_half))
            steady.cold = True
            rows.append(await self._recovery(steady, "every source ten times slower", self._slow_sources))
            return rows
        finally:
            flowing.cancel()
            await asyncio.gather(flowing, return_exceptions=True)
            await steady.settle()

    async def _noticed(
        self, steady: Steady, name: str, trouble: Callable[[Replica], Awaitable[None]], share_max: float
    ) -> list[Row]:
        """Share of calls that failed for it, and how long after the trouble began the last of them was sent."""
        count = failed = 0
        last_s = 0.0
        for service in SERVICES:
            replica = [r for r in await self._mesh.replicas() if r.service == service][1]
            began = self._clock.monotonic()
            await trouble(replica)
            await self._clock.sleep(max(0.0, began + WATCH_S - self._clock.monotonic()))
            ended = self._clock.monotonic()
            await self._clock.sleep(DEADLINE_S + 0.5)  # What was sent last has ended, too.
            calls = steady.between(began, ended)
            count += len(calls)
            failed += sum(call.failed for call in calls)
            last_s = max([last_s, *(call.sent_at - began for call in calls if call.failed)])
            for why, times in Counter(call.why for call in calls if call.failed).most_common(3):
                self._say(f"    {service}: {times} x {why}")
        share = failed / max(1, count)
        self._say(f"{name}: {failed} of {count} calls failed, the last {last_s:.1f} s after")
        rows = [at_most(f"{name}: share of client calls that failed", round(share, 4), "share", share_max)]
        if share_max:
            rows.append(at_most(f"{name}: last failed call after", round(last_s, 2), "s", 2.0))
        return rows

    async def _pause(self, replica: Replica) -> None:
        replica.signal(signal.SIGSTOP)
        try:
            await self._clock.sleep(WATCH_S)
        finally:
            replica.signal(signal.SIGCONT)

    async def _kill(self, replica: Replica) -> None:
        replica.signal(signal.SIGKILL)
        await is_back(self._mesh, replica, self._clock)

    async def _roll(self, replica: Replica) -> None:
        for twin in await self._mesh.replicas():
            if twin.service == replica.service:
                twin.signal(signal.SIGTERM)
                await is_back(self._mesh, twin, self._clock)

    async def _new_replica(self, steady: Steady, client: Client) -> Row:
        """Share of the newest intake in what is accepted 8 to 10 s after it was asked for, against its fair share."""
        asked = self._clock.monotonic()
        runs = (await self._mesh.ask({"intake": 4}))["replicas"]["intake"]
        await self._clock.sleep(max(0.0, asked + NEW_REPLICA_WITHIN_S - self._clock.monotonic()))
        calls = steady.between(asked + NEW_REPLICA_WITHIN_S - 2, asked + NEW_REPLICA_WITHIN_S)
        histories = await asyncio.gather(*(client.history(call.name) for call in calls if not call.failed))
        # An owner is called service-pid-random, and the first event tells who accepted.
        by = Counter(int(history.events[0].actor.split("-")[1]) for history in histories)
        fair = by[runs[-1]["pid"]] * len(runs) / max(1, by.total())
        self._say(f"new replica: accepted {by[runs[-1]['pid']]} of {by.total()} among {len(runs)}")
        await self._mesh.ask({"intake": 3})
        name = f"new replica: share of accepts {NEW_REPLICA_WITHIN_S:g} s after, against its fair share"
        return at_least(name, round(fair, 2), "ratio", 0.8)

    async def _kill_half(self) -> None:
        replicas = [r for r in await self._mesh.replicas() if r.service in SERVICES]
        half = replicas[::2]
        for replica in half:
            replica.signal(signal.SIGKILL)
        await self._clock.sleep(0.5)

    async def _slow_sources(self) -> None:
        await set_source(self._world, "*", {"latency_ms": 50.0, "jitter_ms": 20.0})
        await self._clock.sleep(WATCH_S)
        await set_source(self._world, "*", HEALTHY)

    async def _recovery(self, steady: Steady, name: str, trouble: Callable[[], Awaitable[None]]) -> Row:
        """Seconds from the end of the trouble until 95 % of calls succeed again for good, and no backlog is left."""
        await trouble()
        ended = self._clock.monotonic()
        give_up = ended + BACK_WITHIN_S
        while await pending(self._database) > RATE and self._clock.monotonic() < give_up:
            await self._clock.sleep(0.2)
        drained_s = self._clock.monotonic() - ended
        await self._clock.sleep(max(0.0, ended + WATCH_S - self._clock.monotonic()))
        until = self._clock.monotonic()
        await self._clock.sleep(DEADLINE_S + 0.5)
        well_s = drained_s
        at = ended
        while at < until:
            calls = steady.between(at, at + BUCKET_S)
            if not calls or sum(not call.failed for call in calls) < GOOD * len(calls):
                well_s = max(well_s, at + BUCKET_S - ended)
            at += BUCKET_S
        self._say(f"{name}: well again {well_s:.1f} s after")
        return at_most(f"{name}: back to 95 % goodput, backlog gone, after", round(well_s, 1), "s", RECOVER_WITHIN_S)


async def run(folder: Path, clock: Clock, say: Callable[[str], None]) -> list[Row]:
    """Start a mesh, go through all troubles."""
    words = ["--port-base", str(free_base()), "--replicas", THREE_EACH]
    mesh = Outside(folder / "state", words, {"INTAKE_LEASE__DURATION_S": f"{LEASE_S:g}"})
    say("drills: three replicas of each service")
    try:
        ready = await mesh.start()
        database = f"sqlite:///{folder / 'state' / 'intake.db'}"
        async with Client(ready["targets"]["intake"], client_id="steady") as client:
            return await Drill(mesh, str(ready["parts"]["sandbox"]["address"]), database, clock, say).all(client)
    finally:
        await mesh.stop()


def free_base(count: int = 6) -> int:
    """First of some consecutive ports that nobody listens on."""
    for base in range(20_000 + 10 * random.Random().randrange(900), 32_000, 10):
        if all(_is_free(base + offset) for offset in range(count)):
            return base
    raise RuntimeError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
