"""The heartbeat: measures how late the loop is, and forgets after a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.loop_lag import EVERY_S, KEPT_S, Heartbeat


class Late(FakeClock):
    """A loop that wakes sleepers late, by what it is told; after that it sleeps for good."""

    def __init__(self, lags_s: list[float]) -> None:
        super().__init__()
        self.lags_s: Iterator[float] = iter(lags_s)

    async def sleep(self, seconds: float) -> None:
        lag_s = next(self.lags_s, None)
        if lag_s is None:
            await asyncio.Event().wait()
        await super().sleep(seconds + (lag_s or 0.0))


async def beat(lags_s: list[float]) -> tuple[Heartbeat, Late, list[float]]:
    clock, recorded = Late(lags_s), list[float]()
    heartbeat = Heartbeat(clock, recorded.append)
    beating = asyncio.create_task(heartbeat.beat_forever())
    while len(recorded) < len(lags_s):
        await FakeClock().sleep(0)
    beating.cancel()
    await asyncio.wait([beating])
    return heartbeat, clock, recorded


async def test_every_lag_is_recorded_and_the_last_and_largest_are_known() -> None:
    heartbeat, _, recorded = await beat([0.0, 0.3, 0.01, 0.05])
    assert recorded == pytest.approx([0.0, 0.3, 0.01, 0.05])
    assert heartbeat.lag_s == pytest.approx(0.05)
    assert heartbeat.lag_s_max == pytest.approx(0.3)


async def test_a_lag_is_forgotten_after_a_minute() -> None:
    heartbeat, clock, _ = await beat([0.4, 0.1])
    clock.advance(KEPT_S - 0.2)
    assert heartbeat.lag_s_max == pytest.approx(0.1)
    clock.advance(1)
    assert heartbeat.lag_s_max == 0


async def test_what_is_kept_is_bounded_by_the_beats_of_a_minute() -> None:
    falling = [1 - number / 1000 for number in range(900)]  # The worst case: no lag tops an earlier one.
    heartbeat, _, _ = await beat(falling)
    assert len(heartbeat._peaks) <= KEPT_S / EVERY_S
