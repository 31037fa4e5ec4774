"""How much one caller may submit, so that none takes the room of the others. Pure."""

from __future__ import annotations

from collections import OrderedDict

CLIENTS_MAX = 10_000
"""Callers remembered; the one not heard of for the longest is forgotten, and has its whole burst again."""


class Quota:
    """A token bucket a caller. A batch that exceeds what is left passes once, and is paid for before the next."""

    def __init__(self, a_second: float, burst: int) -> None:
        """a_second  applications a second of each caller; 0: as many as it likes.
        burst     how many at once after a rest.
        """
        self._a_second = a_second
        self._burst = float(burst)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, count: int, now: float) -> float:
        """0 where the caller may submit so many now, which are then counted; else the seconds until it may. `now` is in
        monotonic seconds."""
        if not self._a_second:
            return 0.0
        left, at = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._a_second)
        allowed = left > 0
        self._left[client] = (left - count if allowed else left, now)
        if len(self._left) > CLIENTS_MAX:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._a_second
