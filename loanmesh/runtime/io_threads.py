"""gRPC's own threads, and how eagerly they take the core from the event loop.

A thread that wakes for a packet takes the core from whoever runs there. From a busy loop that is a switch to and fro
for each packet, though what was read waits for the loop anyway: with 64 calls in flight there were 11 such switches an
application. As batch threads (SCHED_BATCH, sched(7)) they wake without taking the core: 2 switches, a twentieth less
CPU. For a loop that is mostly idle it would be delay and nothing else (a tenth more with one call in flight), so they
are batch threads only while the loop is busy. Where there are cores enough, neither makes a difference.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.lasting import Lasting

EVERY_S = 0.25
"""How often the loop's load is looked at, seconds."""
BUSY_SHARE = 0.5
"""From this share of its time on a loop is busy ..."""
CALM_SHARE = 0.4
"""... until it falls below this one."""


class IoThreads:
    """Those of this process that are not the loop's; made and used in the loop's thread.

    used_s  CPU that the loop's thread has used, seconds.
    """

    def __init__(
        self,
        clock: Clock,
        used_s: Callable[[], float] = time.thread_time,
        schedule: Callable[[bool], None] | None = None,
    ) -> None:
        self._clock = clock
        self._used_s = used_s
        self._schedule = schedule or _schedule
        self._before = (clock.monotonic(), used_s())
        self.yielding = False
        """Whether they leave the core to the loop."""

    async def look_forever(self) -> None:
        """Look now and then; ends by cancellation, or where the machine does not let us."""
        lasting = Lasting("io_threads")
        while True:
            await self._clock.sleep(EVERY_S)
            with lasting:
                try:
                    self.look()
                except PermissionError:  # Some sandboxes forbid it; then all stays as it was.
                    return

    def look(self) -> None:
        """Let them yield, or not, by what the loop has used since the last look."""
        now, used_s = self._clock.monotonic(), self._used_s()
        passed_s, worked_s = now - self._before[0], used_s - self._before[1]
        self._before = (now, used_s)
        if passed_s <= 0:
            return
        busy = worked_s / passed_s >= (CALM_SHARE if self.yielding else BUSY_SHARE)
        if busy != self.yielding:
            self._schedule(busy)
            self.yielding = busy


def can_be_scheduled() -> bool:
    """Whether this system knows batch threads."""
    return hasattr(os, "SCHED_BATCH")


def _schedule(yielding: bool) -> None:
    policy, loop = os.SCHED_BATCH if yielding else os.SCHED_OTHER, threading.get_native_id()
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != loop:
            try:
                os.sched_setscheduler(int(task.name), policy, os.sched_param(0))
            except ProcessLookupError:
                continue  # It has just ended.
