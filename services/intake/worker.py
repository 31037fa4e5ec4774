"""Who works when: what is held in memory, the batches under way, the claims from the store, the leases kept alive.

The application just accepted and the one found in the store go through the same queue and the same pipeline.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.lasting import Lasting
from services.intake.application import Claim
from services.intake.held import Held
from services.intake.pace import Pace
from services.intake.ports import Deferred, Result

T = TypeVar("T")
LINGER_S = 0.02
"""How long held applications wait for the batch under way before another one starts beside it, unless it would be full.
Large batches are cheap ones; a batch that waits for a slow source holds nobody up for longer than this."""
GATHER_S = 0.015
"""After a batch of several the next waits so long for those who come back with the answers of the last, unless half of
a full one is there. Without it 64 callers were decided ten at a time; with it twenty, for a quarter less CPU."""
RESTS = 3
COMPUTES_S_MAX = 0.25
"""While requests queue at the door, deciding rests three times as long as its last batch took: what is stored can be
decided later, but who is not answered in time is lost. A batch that takes longer than this waits for a source, which is
no reason to rest, and after as long again three times another one starts beside it."""
CROWDED_PART = 4
"""Into how many parts a full batch is cut while it is crowded at the door and callers are held back or queue there:
then decisions are late anyway, and who knocks waits for a quarter of the time. When they are gone, the backlog is
worked off in full ones: in parts it took half as long again."""
CROWDED_APART_S = 0.1
"""Least time from one batch to the next beside it while it is crowded: one that has taken so long does not compute, it
waits."""
WIDEN_S = 0.25
"""Least time from one more batch side by side to the next one more."""
SLOW_BATCH_S = 1.5
"""A source that hangs holds a batch up for the second that bureau waits; what takes longer is a queue of our making."""
PACED_S = 2.0
"""Under a pace, how much work is held in memory: more would be kept from replicas that are free."""
CLASS_SHARES = {1: 1.0, 2: 0.75}
"""Share of the room in memory that a class may fill, by priority; lower classes half: they must not shut out others."""
OTHERS_SHARE = 0.5


class Leases(Protocol):
    """The part of the store that hands out work."""

    async def claim(self, at_most: int) -> list[Claim]: ...
    async def renew(self, claims: Sequence[Claim]) -> set[str]: ...
    async def release(self, claims: Sequence[Claim]) -> None: ...
    async def expire_overdue(self) -> int: ...


class Worker:
    """Keeps up to `batches` batches of up to `batch_max` applications under way.

    report   called with an event name and facts when something went wrong that mends itself.
    settled  called with what was committed, by application id.
    pressed  whether requests queue at the door.
    crowded  whether those in a hurry wait there, or did a moment ago: then one batch after another, since the callers
             wait for all that are under way together.
    may_begin  how many batches may be under way for those we depend on: 0 while one is known to be down, 1 while it
             is being tried; None: as many as we like.
    """

    def __init__(
        self,
        leases: Leases,
        decide_batch: Callable[[Sequence[Claim]], Awaitable[Mapping[str, Result]]],
        clock: Clock,
        *,
        batch_max: int,
        batches: int,
        held_max: int,
        lease_s: float,
        poll_s: float,
        settled: Callable[[Mapping[str, Result]], None],
        report: Callable[..., None],
        pressed: Callable[[], bool] = lambda: False,
        crowded: Callable[[], bool] = lambda: False,
        may_begin: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._leases = leases
        self._decide_batch = decide_batch
        self._clock = clock
        self._batch_max = batch_max
        self._batches = batches
        self._held_max = held_max
        self._lease_s = lease_s
        self._poll_s = poll_s
        self._settled = settled
        self._report = report
        self._pressed = pressed
        self._crowded = crowded
        self._may_begin = may_begin
        self._rest_until = self._gather_until = self._down_until = float("-inf")
        self._narrowed_at = self._widened_at = self._began_at = float("-inf")
        self._wide = float(batches)
        self._held = Held()
        self._pace = Pace()
        self._working: dict[tuple[str, int], Claim] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._lingering: asyncio.Task[None] | None = None
        self._spilled: int | None = None
        self._wake = asyncio.Event()
        self._claiming: asyncio.Future[list[Claim] | None] | None = None
        self._draining = False

    @property
    def busy(self) -> bool:
        """Whether anything is held or under way."""
        return bool(self._held or self._working)

    def has_room(self, priority: int, more: int = 0) -> bool:
        """Whether another application of the class can be held, after `more` others.

        None is held ahead of its own class's backlog in the store: who came first is decided first.
        """
        room = self._room * CLASS_SHARES.get(priority, OTHERS_SHARE)
        behind = self._spilled is not None and priority >= self._spilled
        if not self._draining and not behind and len(self._held) + len(self._working) + more < room:
            return True
        self._spilled = priority if self._spilled is None else min(self._spilled, priority)
        return False

    @property
    def _room(self) -> int:
        a_second = self._pace.a_second
        return self._held_max if a_second is None else min(self._held_max, self._batch_max + int(a_second * PACED_S))

    @property
    def waiting(self) -> int:
        """Applications held and not begun."""
        return len(self._held)

    def start(self) -> None:
        """Begin to claim and to renew."""
        self._loops = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]

    def offer(self, claims: Sequence[Claim]) -> None:
        """Take applications that were just leased to us; while draining, give them back."""
        if not self._draining:
            self._held.add(claims, self._clock.monotonic())
            self._fill()
        elif claims:
            task = asyncio.create_task(self._give_back(claims), context=contextvars.Context())
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def drain(self) -> None:
        """Take nothing new, give back what is not begun, finish what is."""
        self._draining = True
        loops = [*self._loops, *([self._lingering] if self._lingering else [])]
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        rest = list(self._held)
        self._held.keep(())
        if self._claiming:
            # What the database was just about to hand us would else be nobody's until the lease ends.
            rest += await self._claiming or ()
        if rest:
            await self._give_back(rest)
        # A batch that cannot be committed ends by giving back its leases, in a task of its own.
        while self._under_way:
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _give_back(self, claims: Sequence[Claim]) -> None:
        await self._safely("release", self._leases.release(claims))

    def _fill(self) -> None:
        while self._held and self._may_start():
            size = self._pace.allowance(self._clock.monotonic(), self._full_batch)
            if size == 0:
                break
            self._pace.begun(size)
            self._began_at = self._clock.monotonic()
            batch = self._held.take(size)
            self._working.update(((claim.id, claim.fence), claim) for claim in batch)
            # A context of its own: the batch must not inherit the deadline of whichever caller happened to start it.
            task = asyncio.create_task(self._work(batch), context=contextvars.Context())
            self._under_way.add(task)
            task.add_done_callback(self._done)
        if self._held and not self._draining and (self._lingering is None or self._lingering.done()):
            self._lingering = asyncio.create_task(self._linger(), context=contextvars.Context())

    @property
    def _full_batch(self) -> int:
        cut = self._crowded() and self._pressed()
        return min(len(self._held), max(1, self._batch_max // CROWDED_PART) if cut else self._batch_max)

    @property
    def _most_batches(self) -> int:
        allowed, wide = self._may_begin(), self._batches if self._crowded() else int(self._wide)
        return wide if allowed is None else min(wide, allowed)

    def _may_start(self) -> bool:
        now, under_way = self._clock.monotonic(), len(self._under_way)
        if crowded := self._crowded():
            self._wide, self._widened_at = 1.0, now
        if now < self._down_until or under_way >= self._most_batches:
            return False
        if self._pressed():
            waits = now - self._began_at >= (1 + RESTS) * COMPUTES_S_MAX
            if now < self._rest_until or (under_way and not waits):
                return False
        if not under_way:
            return now >= self._gather_until or len(self._held) * 2 >= self._batch_max
        if now - self._began_at < (CROWDED_APART_S if crowded else LINGER_S):
            return False
        return crowded or len(self._held) >= self._batch_max or now - self._held.came_first_at() >= LINGER_S

    def _side_by_side(self, took_s: float, now: float) -> None:
        """Fewer batches side by side when they take longer than a slow source makes them: those we ask are full."""
        if took_s < SLOW_BATCH_S:
            if now >= self._widened_at + WIDEN_S:
                self._wide, self._widened_at = min(float(self._batches), self._wide + 1 / self._wide), now
        elif now - took_s >= self._narrowed_at:
            self._wide, self._narrowed_at = max(1.0, self._wide / 2), now

    async def _linger(self) -> None:
        while self._held:
            gathers_s = self._gather_until - self._clock.monotonic()
            await self._clock.sleep(gathers_s if gathers_s > 0 and not self._under_way else LINGER_S)
            self._fill()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._fill()
        if len(self._held) < self._room // 2:
            self._wake.set()

    async def _work(self, batch: Sequence[Claim]) -> None:
        started_at = self._clock.monotonic()
        again: Sequence[Claim] = ()
        try:
            settled = await self._decide_batch(batch)
            overloaded = sum(isinstance(result, Deferred) and result.overloaded for result in settled.values())
            self._pace.ended(len(settled) - overloaded, overloaded, started_at, self._clock.monotonic())
            self._settled(settled)
            if len(settled) < len(batch):
                self._report("fence_lost", count=len(batch) - len(settled))
        except DependencyDown as error:
            # Nothing was committed, or nobody knows: done again as soon as the store may be back, and the fence tells.
            self._report("commit_failed", count=len(batch), error=str(error))
            self._down_until = self._clock.monotonic() + self._poll_s
            again = batch
        except Exception as error:  # noqa: BLE001  One bad batch must not end the worker; the leases end, others try.
            self._report("batch_failed", count=len(batch), error_type=type(error).__name__, exc_info=error)
        finally:
            ended_at = self._clock.monotonic()
            if len(batch) > 1:
                self._gather_until = ended_at + GATHER_S
            self._rest_until = ended_at + RESTS * min(ended_at - started_at, COMPUTES_S_MAX)
            self._side_by_side(ended_at - started_at, ended_at)
            for claim in batch:
                self._working.pop((claim.id, claim.fence), None)
            self.offer(again)

    async def _claim_forever(self) -> None:
        lasting = Lasting("claim")
        for rounds in itertools.count():
            went_well = False
            with lasting:
                await self._claim_once(expires=rounds % 50 == 0)
                went_well = True
            if not went_well:
                await self._clock.sleep(self._poll_s)

    async def _claim_once(self, *, expires: bool) -> None:
        self._wake.clear()
        room = self._room - len(self._held) - len(self._working)
        # While nothing can be decided, what is in the store is left there, for whoever can.
        at_most = min(room, self._batch_max * self._batches) if self._most_batches else 0
        claims = None
        if at_most > 0:
            # Shielded, so that a drain that comes meanwhile still learns what was claimed.
            self._claiming = asyncio.ensure_future(self._safely("claim", self._leases.claim(at_most)))
            claims = await asyncio.shield(self._claiming)
            self._claiming = None
        if claims:
            self.offer(claims)
        if expires:
            await self._safely("expire", self._leases.expire_overdue())
        if at_most <= 0:
            await self._until_woken_or_polled()
        elif claims is None or len(claims) < at_most:
            if claims is not None:
                self._spilled = None  # All that waited in the store is held now: the fast way is open again.
            await self._clock.sleep(self._poll_s)

    async def _until_woken_or_polled(self) -> None:
        waits = [asyncio.ensure_future(self._wake.wait()), asyncio.ensure_future(self._clock.sleep(self._poll_s))]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _renew_forever(self) -> None:
        while True:
            await self._clock.sleep(self._lease_s / 3)
            held = [*self._working.values(), *self._held]
            kept = await self._safely("renew", self._leases.renew(held)) if held else None
            if kept is not None:
                # What is not ours any more need not be begun; what is begun will fail at its fence. What came in
                # meanwhile is ours: it was not asked about.
                lost = {(claim.id, claim.fence) for claim in held if claim.id not in kept}
                self._held.keep({(claim.id, claim.fence) for claim in self._held} - lost)

    async def _safely(self, what: str, work: Awaitable[T]) -> T | None:
        try:
            return await work
        except DependencyDown as error:
            self._report(f"{what}_failed", error=str(error))
        except Exception as error:  # noqa: BLE001  A replica whose loop has ended looks well and decides nothing.
            self._report(f"{what}_failed", error_type=type(error).__name__, exc_info=error)
        return None
