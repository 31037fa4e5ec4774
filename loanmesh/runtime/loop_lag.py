"""How late the event loop is: a heartbeat that asks to be woken and measures when it was. The pulse of the process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.lasting import Lasting

EVERY_S = 0.25
"""Often enough to see a block of a few hundred ms, seldom enough to cost nothing (4 wake-ups a second)."""
KEPT_S = 60.0


class Heartbeat:
    """Beats until cancelled.

    record  called with each lag, seconds; for a histogram.
    """

    def __init__(self, clock: Clock, record: Callable[[float], None] = lambda _: None) -> None:
        self._clock = clock
        self._record = record
        # Falling maxima only: a lag that a later one tops can never again be the maximum. Bounded by KEPT_S / EVERY_S.
        self._peaks: deque[tuple[float, float]] = deque()
        self.lag_s = 0.0
        """Lag of the last beat, seconds."""

    @property
    def lag_s_max(self) -> float:
        """Largest lag of the last minute, seconds."""
        self._forget()
        return self._peaks[0][1] if self._peaks else 0.0

    async def beat_forever(self) -> None:
        """Beat; ends by cancellation only."""
        lasting = Lasting("heartbeat")
        while True:
            asked = self._clock.monotonic()
            await self._clock.sleep(EVERY_S)
            with lasting:
                self._beat(self._clock.monotonic(), asked)

    def _beat(self, now: float, asked: float) -> None:
        self.lag_s = max(0.0, now - asked - EVERY_S)
        self._forget()
        while self._peaks and self._peaks[-1][1] <= self.lag_s:
            self._peaks.pop()
        self._peaks.append((now, self.lag_s))
        self._record(self.lag_s)

    def _forget(self) -> None:
        too_old = self._clock.monotonic() - KEPT_S
        while self._peaks and self._peaks[0][0] < too_old:
            self._peaks.popleft()
