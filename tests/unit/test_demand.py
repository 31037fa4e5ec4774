"""What the loop asks of its core: work and waiting for it, over a while."""

from __future__ import annotations

import time

from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.demand import EVERY_S, Demand, wanted_s


def test_it_is_a_share_of_the_time_since_the_last_look_and_never_more_than_all() -> None:
    clock, wanted = FakeClock(), [0.0]
    demand = Demand(clock, lambda: wanted[0])
    clock.advance(EVERY_S)
    wanted[0] = EVERY_S / 2
    assert demand.share() == 0.5
    clock.advance(EVERY_S / 2)
    wanted[0] += 1.0
    assert demand.share() == 0.5, "too soon to tell"
    clock.advance(EVERY_S / 2)
    assert demand.share() == 1.0
    clock.advance(1.0)
    assert demand.share() == 0.0


def test_work_is_wanted_and_sleep_is_not() -> None:
    clock = SystemClock()
    started, before = clock.monotonic(), wanted_s()
    while time.thread_time() < 0.05 or wanted_s() - before < 0.05:
        sum(range(1000))
        assert clock.monotonic() - started < 30
    assert wanted_s() - before >= 0.05
