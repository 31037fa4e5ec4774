"""The estimate: a place in the backlog over the rate of busy time."""

from __future__ import annotations

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from services.intake.estimate import AT_LEAST_S, TOLD_FACTOR, TOLD_MAX, UNKNOWN_S, Estimate

LATE = 1e9
"""Came after all that waits."""


class Backlog:
    """Rows as the store counts them."""

    def __init__(self, *rows: tuple[int, int, int, int]) -> None:
        self.rows = list(rows)
        self.fails = False

    async def __call__(self) -> list[tuple[int, int, int, int]]:
        if self.fails:
            raise DependencyDown("no connection")
        return self.rows


def decide(estimate: Estimate, clock: FakeClock, a_second: int, seconds: int) -> None:
    for _ in range(seconds * 10):
        clock.advance(0.1)
        estimate.decided(a_second // 10, busy=True)


async def test_before_anything_was_decided_a_short_backlog_is_soon_and_a_long_one_unknown() -> None:
    clock = FakeClock()
    assert await Estimate(Backlog((1, 0, 10, 1)), clock).seconds(1, LATE) == AT_LEAST_S
    assert await Estimate(Backlog((1, 0, 1000, 1)), clock).seconds(1, LATE) == UNKNOWN_S


async def test_the_place_in_the_backlog_over_the_rate() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog((1, 100, 500, 1), (1, 101, 500, 1), (3, 50, 1000, 1)), clock)
    decide(estimate, clock, 50, 20)
    assert await estimate.seconds(1, LATE) == pytest.approx(1000 / 50, rel=0.05)
    assert await estimate.seconds(3, LATE) == pytest.approx(2000 / 50, rel=0.05)
    assert await estimate.seconds(1, not_before=100.5) == pytest.approx(500 / 50, rel=0.05)


async def test_time_without_work_does_not_slow_the_rate() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog((1, 0, 1000, 1)), clock)
    decide(estimate, clock, 100, 5)
    estimate.decided(10, busy=False)
    clock.advance(600)
    estimate.decided(10, busy=True)
    decide(estimate, clock, 100, 1)
    assert await estimate.seconds(1, LATE) == pytest.approx(10.0, rel=0.1)


async def test_old_figures_are_forgotten_however_little_was_to_do_since() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog((1, 0, 1000, 1)), clock)
    decide(estimate, clock, 10, 5)
    estimate.decided(0, busy=False)
    clock.advance(3600)
    assert await estimate.seconds(1, LATE) == UNKNOWN_S
    decide(estimate, clock, 100, 3)
    assert await estimate.seconds(1, LATE) == pytest.approx(10.0, rel=0.1)


async def test_a_store_that_cannot_count_does_not_hold_up_a_receipt() -> None:
    clock = FakeClock()
    backlog = Backlog((1, 0, 100, 1))
    estimate = Estimate(backlog, clock)
    decide(estimate, clock, 10, 5)
    assert await estimate.seconds(1, LATE) == pytest.approx(10.0, rel=0.05)
    backlog.fails = True
    clock.advance(30)
    assert await estimate.seconds(1, LATE) == pytest.approx(10.0, rel=0.05)
    assert await estimate.backlog() == 100


async def test_replicas_that_hold_work_share_it() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog((1, 0, 500, 2), (1, 1, 500, 4)), clock)
    decide(estimate, clock, 50, 10)
    assert await estimate.seconds(1, LATE) == pytest.approx(1000 / 200, rel=0.05)


async def test_an_estimate_is_compared_once_with_when_it_was_decided() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog(), clock)
    estimate.told("late", 10.0)
    estimate.told("soon", AT_LEAST_S)
    clock.advance(5)
    estimate.told("late", 99.0)  # Told again when somebody looked: the first word counts.
    clock.advance(10)
    assert estimate.came_true("late") == 1.5
    assert estimate.came_true("late") is None
    assert estimate.came_true("soon") is None, "soon is no figure to compare with"


async def test_estimates_kept_are_bounded_and_make_room_when_they_tell_nothing_any_more() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog(), clock)
    for number in range(TOLD_MAX + 1):
        estimate.told(str(number), 2.0)
    assert estimate.came_true(str(TOLD_MAX)) is None
    clock.advance(2.0 * TOLD_FACTOR)
    estimate.told("new", 2.0)
    assert estimate.came_true("0") is None
    assert estimate.came_true("new") == 0.0


class Elsewhere:
    """What others decide: so many a second, for ever."""

    def __init__(self, a_second: float, clock: FakeClock) -> None:
        self.a_second = a_second
        self.clock = clock
        self.spans: list[float] = []

    async def __call__(self, since: float, at_most: int) -> int:
        self.spans.append(self.clock.now().timestamp() - since)
        return min(at_most, round(self.spans[-1] * self.a_second))


async def test_a_replica_that_decides_nothing_estimates_by_what_the_others_decide() -> None:
    clock = FakeClock()
    estimate = Estimate(Backlog((1, 0, 6000, 4)), clock, Elsewhere(300, clock))
    assert await estimate.seconds(1, LATE) == pytest.approx(20)
    assert estimate.rate() is None, "what a replica does itself is another figure"


async def test_time_in_which_nothing_waited_does_not_slow_the_others_rate() -> None:
    clock = FakeClock()
    backlog, elsewhere = Backlog(), Elsewhere(300, clock)
    estimate = Estimate(backlog, clock, elsewhere)
    assert await estimate.seconds(1, LATE) == AT_LEAST_S
    backlog.rows = [(1, 0, 6000, 4)]
    clock.advance(4)
    assert await estimate.seconds(1, LATE) == pytest.approx(20)
    assert elsewhere.spans == [pytest.approx(4)]


async def test_a_rate_of_others_that_cannot_be_counted_any_more_is_forgotten() -> None:
    clock = FakeClock()
    backlog = Backlog((1, 0, 6000, 4))
    estimate = Estimate(backlog, clock, Elsewhere(300, clock))
    await estimate.seconds(1, LATE)
    backlog.fails = True
    clock.advance(61)
    assert await estimate.seconds(1, LATE) == UNKNOWN_S
