"""When will it be decided? From its place in the backlog and the rate at which we decide while there is work."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import NotNow

WINDOW_S = 10.0
"""Over how much busy time the rate is measured, seconds."""
FORGET_S = 60.0
"""Figures older than this say nothing of now, however little was to do since."""
AT_LEAST_S = 1.0
UNKNOWN_S = 30.0
"""Said of a backlog before anything was decided."""
REFRESH_S = 1.0
REFRESH_SHARE = 0.02
"""Share of the time that may go into asking for the backlog: counting a very long one takes a while itself."""
PATIENCE_S = 0.05
"""How long an answer waits for a new count; then the last one has to do. An estimate must not hold up a receipt."""
SPAN_S_MIN = 1.0
"""Decisions of a shorter time say little of the rate."""
DECIDED_MAX = 50_000
"""Decisions counted at most, where a rate is counted in the store: bounds what the count costs."""
TOLD_MAX = 1024
"""Estimates that are kept to see whether they come true. Those of a second mean no more than soon, and are not."""
TOLD_FACTOR = 10
"""What takes this many times as long as was told is decided elsewhere, or will never tell us anything."""
Backlog = Sequence[tuple[int, int, int, int]]
"""Rows of (priority, second in which they came, how many, held by how many replicas), in the order of their turn."""


class Estimate:
    """Estimates decision times.

    count_decided  how many were decided since a time of day, seconds since 1970, counting up to a bound: for a replica
                   that decides nothing itself, and so measures nothing. None where it does.
    """

    def __init__(
        self,
        count: Callable[[], Awaitable[Backlog]],
        clock: Clock,
        count_decided: Callable[[float, int], Awaitable[int]] | None = None,
    ) -> None:
        self._count = count
        self._count_decided = count_decided
        self._nothing_waited_at = float("-inf")
        # When it was counted, and how many a second all replicas decided together.
        self._together = (float("-inf"), 0.0)
        self._clock = clock
        self._busy_s = 0.0
        self._last = clock.monotonic()
        self._was_busy = False
        # Busy time before and after, when, and how many.
        self._decided: deque[tuple[float, float, float, int]] = deque()
        self._decided_in_all = 0
        self._turns: list[tuple[int, int]] = []
        self._ahead: list[int] = [0]
        self._replicas = 1
        self._refresh_at = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        # When, and how many seconds; oldest first.
        self._told: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def told(self, application_id: str, seconds: float) -> None:
        """A caller was told so for the first time; kept for as many as there is room."""
        if seconds <= AT_LEAST_S:
            return
        now = self._clock.monotonic()
        if len(self._told) >= TOLD_MAX:
            at, said_s = next(iter(self._told.values()))
            if now - at < said_s * TOLD_FACTOR:
                return
            self._told.popitem(last=False)
        self._told.setdefault(application_id, (now, seconds))

    def came_true(self, application_id: str) -> float | None:
        """It was just decided: after how many times as long as was told; None where nothing is kept of that."""
        if (kept := self._told.pop(application_id, None)) is None:
            return None
        at, said_s = kept
        return (self._clock.monotonic() - at) / said_s

    def decided(self, count: int, busy: bool) -> None:
        """So many were just decided; whether there is still work. Time without work does not count."""
        now = self._clock.monotonic()
        # The first batch after a rest began some time ago, but how long it took says little of the rate.
        if self._was_busy:
            before, self._busy_s = self._busy_s, self._busy_s + now - self._last
            self._decided.append((before, self._busy_s, now, count))
            self._decided_in_all += count
        self._last, self._was_busy = now, busy

    async def seconds(self, priority: int, not_before: float) -> float:
        """Seconds until an application of the class is decided that came, or may be looked at, at `not_before`."""
        await self._refreshed()
        ahead = self._ahead[bisect_right(self._turns, (priority, int(not_before)))]
        rate = self._rate_together()
        if rate is None:
            return AT_LEAST_S if ahead < 64 else UNKNOWN_S
        return max(AT_LEAST_S, ahead / rate)

    async def backlog(self) -> int:
        """How many wait that could be worked on now, by the last count."""
        await self._refreshed()
        return self._ahead[-1]

    @property
    def replicas(self) -> int:
        """How many replicas hold work, by the last count; at least 1."""
        return self._replicas

    async def _refreshed(self) -> None:
        if self._refreshing is None and self._clock.monotonic() >= self._refresh_at:
            self._refreshing = asyncio.create_task(self._refresh())
        if self._refreshing:
            await asyncio.wait([self._refreshing], timeout=PATIENCE_S)

    async def _refresh(self) -> None:
        started = self._clock.monotonic()
        self._refresh_at = started + REFRESH_S
        try:
            backlog = await self._count()
            if self._count_decided:
                await self._count_rate(self._count_decided, waits=bool(backlog))
        except NotNow:
            return  # The last count has to do; the store itself tells of its trouble.
        finally:
            took_s = self._clock.monotonic() - started
            self._refresh_at = started + max(REFRESH_S, took_s / REFRESH_SHARE)
            self._refreshing = None
        self._turns = [(priority, second) for priority, second, _, _ in backlog]
        self._ahead = [0, *accumulate(count for _, _, count, _ in backlog)]
        self._replicas = max([1, *(held for *_, held in backlog)])

    async def _count_rate(self, count_decided: Callable[[float, int], Awaitable[int]], *, waits: bool) -> None:
        now = self._clock.monotonic()
        if not waits:
            self._nothing_waited_at = now
            return
        # Time without work does not count here either.
        span_s = min(WINDOW_S, now - self._nothing_waited_at)
        if span_s >= SPAN_S_MIN:
            count = await count_decided(self._clock.now().timestamp() - span_s, DECIDED_MAX)
            self._together = (now, max(0.1, count / span_s))

    def _rate_together(self) -> float | None:
        own = self.rate()
        if own is not None:
            return own * self._replicas
        counted_at, rate = self._together
        return rate if counted_at >= self._clock.monotonic() - FORGET_S else None

    def rate(self) -> float | None:
        """Decided a second of busy time by this replica; None before there is a figure."""
        while self._decided and (
            self._decided[0][1] < self._busy_s - WINDOW_S or self._decided[0][2] < self._clock.monotonic() - FORGET_S
        ):
            self._decided_in_all -= self._decided.popleft()[-1]
        if not self._decided:
            return None
        span_s = self._busy_s - self._decided[0][0]
        return max(0.1, self._decided_in_all / max(span_s, 0.05))
