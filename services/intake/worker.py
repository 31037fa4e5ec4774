"""Who works when: the queue in memory, the batches under way, the claims from the store, the leases kept alive.

The application just accepted and the one found in the store go through the same queue and the same pipeline.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from services.intake.application import Claim

T = TypeVar("T")


class Leases(Protocol):
    """The part of the store that hands out work."""

    async def claim(self, at_most: int) -> list[Claim]: ...
    async def renew(self, claims: Sequence[Claim]) -> set[str]: ...
    async def release(self, claims: Sequence[Claim]) -> None: ...
    async def expire_overdue(self) -> int: ...


class Worker:
    """Keeps up to `batches` batches of up to `batch_max` applications under way.

    report  called with an event name and facts when something went wrong that mends itself.
    settled  called with the ids of each committed batch.
    """

    def __init__(
        self,
        leases: Leases,
        decide_batch: Callable[[Sequence[Claim]], Awaitable[set[str]]],
        clock: Clock,
        *,
        batch_max: int,
        batches: int,
        held_max: int,
        lease_s: float,
        poll_s: float,
        settled: Callable[[set[str]], None],
        report: Callable[..., None],
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
        self._queue: deque[Claim] = deque()
        self._working: dict[str, Claim] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._draining = False

    @property
    def has_room(self) -> bool:
        """Whether another application can be held."""
        return not self._draining and len(self._queue) + len(self._working) < self._held_max

    @property
    def waiting(self) -> int:
        """Applications in the queue, not begun."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to claim and to renew."""
        self._loops = [asyncio.create_task(self._claim_forever()), asyncio.create_task(self._renew_forever())]

    def offer(self, claim: Claim) -> None:
        """Take an application that was just leased to us."""
        self._queue.append(claim)
        self._fill()

    async def drain(self) -> None:
        """Take nothing new, give back what is not begun, finish what is."""
        self._draining = True
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        rest = list(self._queue)
        self._queue.clear()
        if rest:
            await self._safely("release", self._leases.release(rest))
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def _fill(self) -> None:
        while self._queue and len(self._under_way) < self._batches:
            batch = [self._queue.popleft() for _ in range(min(self._batch_max, len(self._queue)))]
            self._working.update((claim.id, claim) for claim in batch)
            # A context of its own: the batch must not inherit the deadline of whichever caller happened to start it.
            task = asyncio.create_task(self._work(batch), context=contextvars.Context())
            self._under_way.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._fill()

    async def _work(self, batch: Sequence[Claim]) -> None:
        try:
            settled = await self._decide_batch(batch)
            self._settled(settled)
            if len(settled) < len(batch):
                self._report("fence_lost", count=len(batch) - len(settled))
        except DependencyDown as error:
            # Nothing was committed: the leases end by themselves and the work is done again.
            self._report("commit_failed", count=len(batch), error=str(error))
        except Exception as error:  # noqa: BLE001  One bad batch must not end the worker; the leases end, others try.
            self._report("batch_failed", count=len(batch), error_type=type(error).__name__, exc_info=error)
        finally:
            for claim in batch:
                self._working.pop(claim.id, None)

    async def _claim_forever(self) -> None:
        rounds = 0
        while True:
            room = self._held_max - len(self._queue) - len(self._working)
            at_most = min(room, self._batch_max * self._batches)
            claims = await self._safely("claim", self._leases.claim(at_most)) if at_most > 0 else None
            for claim in claims or ():
                self.offer(claim)
            if rounds % 50 == 0:
                await self._safely("expire", self._leases.expire_overdue())
            rounds += 1
            if not claims or len(claims) < at_most:
                await self._clock.sleep(self._poll_s)

    async def _renew_forever(self) -> None:
        while True:
            await self._clock.sleep(self._lease_s / 3)
            held = [*self._working.values(), *self._queue]
            kept = await self._safely("renew", self._leases.renew(held)) if held else None
            if kept is not None:
                # What is not ours any more need not be begun; what is begun will fail at its fence.
                self._queue = deque(claim for claim in self._queue if claim.id in kept)

    async def _safely(self, what: str, work: Awaitable[T]) -> T | None:
        try:
            return await work
        except DependencyDown as error:
            self._report(f"{what}_failed", error=str(error))
            return None
