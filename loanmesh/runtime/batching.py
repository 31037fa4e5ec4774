"""Micro-batches that form by themselves: what arrived while the last batch was under way becomes the next one."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import LoanmeshError, Overloaded

I = TypeVar("I")  # noqa: E741  Item.
O = TypeVar("O")  # noqa: E741  Outcome.


class Batcher(Generic[I, O]):
    """Runs items in batches; at low load a batch is one item and adds no delay.

    run        takes a batch, answers one outcome an item, in order; an outcome that is a LoanmeshError is raised to
               the item's caller; an exception fails the whole batch.
    max_items  largest batch.
    max_waiting  most items that wait; beyond, `submit` raises Overloaded at once.
    in_flight  batches under way at the same time.
    apart_s    least time from one batch to the next, seconds, where the first was one of several or others are `busy`:
               else calls that trickle in while a commit takes a moment would make batches of two, a commit each.
    clock      tells how long the oldest has waited: the signal of overload.
    """

    def __init__(
        self,
        run: Callable[[Sequence[I]], Awaitable[Sequence[O | LoanmeshError]]],
        *,
        max_items: int,
        max_waiting: int,
        clock: Clock,
        in_flight: int = 1,
        apart_s: float = 0.0,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run = run
        self._max_items = max_items
        self._max_waiting = max_waiting
        self._free = in_flight
        self._clock = clock
        self._apart_s = apart_s
        self._busy = busy
        self._next_at = float("-inf")
        self._waiting: deque[tuple[I, asyncio.Future[O]]] = deque()
        self._arrived: OrderedDict[asyncio.Future[O], float] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waited_s(self) -> float:
        """How long the oldest item that is not answered has been here, seconds."""
        return self._clock.monotonic() - next(iter(self._arrived.values())) if self._arrived else 0.0

    async def submit(self, item: I) -> O:
        """The item's outcome. A cancelled caller leaves its item in the batch: the work may already have been done."""
        (future,) = self._enter((item,))
        return await future

    async def submit_all(self, items: Sequence[I]) -> list[O]:
        """The outcomes of several, in order: let in together or not at all. Raises what the first that failed did."""
        return await asyncio.gather(*self._enter(items))

    def _enter(self, items: Sequence[I]) -> list[asyncio.Future[O]]:
        # Where nobody waits there is room even for more than may wait.
        if self._waiting and len(self._waiting) + len(items) > self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests wait already; nothing was stored", retry_s=0.5)
        new_future, now = asyncio.get_running_loop().create_future, self._clock.monotonic()
        futures: list[asyncio.Future[O]] = [new_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        self._arrived.update(dict.fromkeys(futures, now))
        if self._free:
            self._free -= 1
            task = asyncio.create_task(self._work())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return futures

    async def _work(self) -> None:
        await asyncio.sleep(0)  # noqa: TID251  Lets the callers of this turn of the loop join; takes no time.
        try:
            while self._waiting:
                if (wait_s := self._next_at - self._clock.monotonic()) > 0:
                    await self._clock.sleep(wait_s)
                batch = [self._waiting.popleft() for _ in range(min(self._max_items, len(self._waiting)))]
                if len(batch) > 1 or self._busy():
                    self._next_at = self._clock.monotonic() + self._apart_s
                await self._run_one(batch)
        finally:
            self._free += 1

    async def _run_one(self, batch: list[tuple[I, asyncio.Future[O]]]) -> None:
        try:
            outcomes: Sequence[O | LoanmeshError | Exception] = await self._run([item for item, _ in batch])
            if len(outcomes) != len(batch):
                raise RuntimeError(f"{len(outcomes)} outcomes for {len(batch)} items: nobody knows whose")
        except Exception as error:  # noqa: BLE001  Each caller of the batch is handed it.
            outcomes = [error] * len(batch)
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            del self._arrived[future]
            if future.done():
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)
