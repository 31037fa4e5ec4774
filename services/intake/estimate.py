"""When will it be decided? From the backlog and the rate at which we decide."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from loanmesh.runtime.clock import Clock

WINDOW_S = 30.0
AT_LEAST_S = 1.0


class Estimate:
    """Estimates decision times; asks the store for the backlog at most once a second."""

    def __init__(self, backlog: Callable[[], Awaitable[int]], clock: Clock) -> None:
        self._backlog = backlog
        self._clock = clock
        self._decided: deque[tuple[float, int]] = deque()
        self._known = 0
        self._known_at = float("-inf")

    def decided(self, count: int) -> None:
        """So many were just decided."""
        self._decided.append((self._clock.monotonic(), count))

    async def seconds(self) -> float:
        """Seconds until an application stored now is decided: backlog over the rate of the last half minute."""
        now = self._clock.monotonic()
        while self._decided and self._decided[0][0] < now - WINDOW_S:
            self._decided.popleft()
        if now - self._known_at > 1.0:
            self._known_at = now
            self._known = await self._backlog()
        count = sum(number for _, number in self._decided)
        if not count:
            return AT_LEAST_S if self._known < 64 else WINDOW_S
        rate = count / max(1.0, now - self._decided[0][0])
        return max(AT_LEAST_S, self._known / rate)
