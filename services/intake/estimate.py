"""When will it be decided? From its place in the backlog and the rate at which we decide while there is work."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate

from loanmesh.runtime.clock import Clock

WINDOW_S = 10.0
"""Over how much busy time the rate is measured, seconds."""
AT_LEAST_S = 1.0
UNKNOWN_S = 30.0
"""Said of a backlog before anything was decided."""
REFRESH_S = 1.0
REFRESH_SHARE = 0.02
"""Share of the time that may go into asking for the backlog: counting a very long one takes a while itself."""
Backlog = Sequence[tuple[int, int, int, int]]
"""Rows of (priority, second in which they came, how many, held by how many replicas), in the order of their turn."""


class Estimate:
    """Estimates decision times."""

    def __init__(self, backlog: Callable[[], Awaitable[Backlog]], clock: Clock) -> None:
        self._backlog = backlog
        self._clock = clock
        self._busy_s = 0.0
        self._last = clock.monotonic()
        self._was_busy = False
        self._decided: deque[tuple[float, int]] = deque()
        self._turns: list[tuple[int, int]] = []
        self._ahead: list[int] = [0]
        self._replicas = 1
        self._refresh_at = float("-inf")

    def decided(self, count: int, busy: bool) -> None:
        """So many were just decided; whether there is still work. Time without work does not count."""
        now = self._clock.monotonic()
        # The first batch after a rest began some time ago, but how long it took says little of the rate.
        if self._was_busy:
            self._busy_s += now - self._last
            self._decided.append((self._busy_s, count))
        self._last, self._was_busy = now, busy
        while self._decided and self._decided[0][0] < self._busy_s - WINDOW_S:
            self._decided.popleft()

    async def seconds(self, priority: int, not_before: float | None = None) -> float:
        """Seconds until an application of the class is decided: one that came just now, or at `not_before`."""
        started = self._clock.monotonic()
        if started >= self._refresh_at:
            self._refresh_at = started + REFRESH_S
            self._know(await self._backlog())
            took_s = self._clock.monotonic() - started
            self._refresh_at = started + max(REFRESH_S, took_s / REFRESH_SHARE)
        turn = (priority, float("inf") if not_before is None else int(not_before))
        ahead = self._ahead[bisect_right(self._turns, turn)]
        rate = self._rate()
        if rate is None:
            return AT_LEAST_S if ahead < 64 else UNKNOWN_S
        return max(AT_LEAST_S, ahead / (rate * self._replicas))

    def _know(self, backlog: Backlog) -> None:
        self._turns = [(priority, second) for priority, second, _, _ in backlog]
        self._ahead = [0, *accumulate(count for _, _, count, _ in backlog)]
        self._replicas = max([1, *(held for *_, held in backlog)])

    def _rate(self) -> float | None:
        """Decided a second of busy time by this replica; None before there is a figure."""
        if not self._decided:
            return None
        span_s = self._busy_s - max(0.0, self._busy_s - WINDOW_S)
        return max(0.1, sum(count for _, count in self._decided) / max(span_s, 0.05))
