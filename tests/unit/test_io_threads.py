"""When gRPC's threads leave the core to the loop."""

from __future__ import annotations

import os
import threading

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.io_threads import IoThreads, can_be_scheduled


class ALoop:
    """A loop's thread that has used so much CPU; and what its process's other threads were told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.used_s = 0.0
        self.told: list[bool] = []
        self.threads = IoThreads(self.clock, lambda: self.used_s, self.told.append)

    def work(self, share: float) -> None:
        self.used_s += share
        self.clock.advance(1.0)
        self.threads.look()


def test_they_yield_to_a_busy_loop_until_it_is_calm_again() -> None:
    loop = ALoop()
    for share in (0.1, 0.9, 0.45, 0.3):
        loop.work(share)
    assert loop.told == [True, False]


def test_a_look_without_time_between_changes_nothing() -> None:
    loop = ALoop()
    loop.threads.look()
    assert loop.told == []


async def test_where_it_is_forbidden_all_stays_as_it_was() -> None:
    clock = FakeClock()

    def forbidden(_: bool) -> None:
        raise PermissionError

    await IoThreads(clock, lambda: clock.monotonic(), forbidden).look_forever()


@pytest.mark.skipif(not can_be_scheduled(), reason="no batch threads here")
def test_a_real_thread_yields_and_the_loops_own_does_not() -> None:
    clock, end, started = FakeClock(), threading.Event(), threading.Event()

    def wait() -> None:
        started.set()
        end.wait()

    other = threading.Thread(target=wait)
    other.start()
    assert started.wait(10)
    try:
        used = [0.0]
        threads = IoThreads(clock, lambda: used[0])
        for share, policy in ((0.9, os.SCHED_BATCH), (0.1, os.SCHED_OTHER)):
            used[0] += share
            clock.advance(1.0)
            threads.look()
            assert other.native_id
            assert os.sched_getscheduler(other.native_id) == policy
            assert os.sched_getscheduler(threading.get_native_id()) == os.SCHED_OTHER
    finally:
        end.set()
        other.join(10)
