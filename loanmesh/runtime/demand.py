"""How much of a core the event loop asks for: what it gets, and what it waits for while others have it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from loanmesh.runtime.clock import Clock

EVERY_S = 0.1
"""Over how long it is measured, at least."""
_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def wanted_s() -> float:
    """CPU that this thread has used, and for how long it waited for a core, seconds. Without the wait where the system
    does not tell of it."""
    try:
        used_ns, waited_ns, _ = map(int, _SCHEDSTAT.read_text(encoding="ascii").split())
        return (used_ns + waited_ns) / 1e9 or time.thread_time()  # Some kernels count nothing there.
    except (OSError, ValueError):
        return time.thread_time()


class Demand:
    """Of one thread; made and asked in it."""

    def __init__(self, clock: Clock, wanted_s: Callable[[], float] = wanted_s) -> None:
        self._clock = clock
        self._wanted_s = wanted_s
        self._before = (clock.monotonic(), wanted_s())
        self._share = 0.0

    def share(self) -> float:
        """Share of its time that the thread was at work or ready for it, of late: 0 to 1."""
        now = self._clock.monotonic()
        if (passed_s := now - self._before[0]) >= EVERY_S:
            wanted_s = self._wanted_s()
            self._share = min(1.0, (wanted_s - self._before[1]) / passed_s)
            self._before = (now, wanted_s)
        return self._share
