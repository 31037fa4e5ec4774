"""The adaptive limit: finds what the other side can take, and shrinks once a round trip."""

from __future__ import annotations

import pytest

from loanmesh.runtime.adaptive import AdaptiveLimit, AdaptiveSettings
from loanmesh.runtime.clock import FakeClock


def a_limit(clock: FakeClock, **settings: float) -> AdaptiveLimit:
    return AdaptiveLimit(AdaptiveSettings.model_validate(settings), clock)


def test_it_doubles_a_round_trip_until_the_first_queue_and_then_feels_its_way() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=4, ceiling=1000)
    for _ in range(4):
        for _ in range(limit.calls):
            limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert limit.calls == 64
    limit.answered(clock.monotonic(), 64, 0.11)
    clock.advance(0.1)
    before = limit.calls
    for _ in range(before):
        limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert before + 4 <= limit.calls <= before + 9


def test_it_shrinks_in_proportion_and_at_most_by_half() -> None:
    for delay_s, expected in ((0.105, 90), (0.15, 66), (5.0, 50)):
        limit = a_limit(FakeClock(), initial=100)
        limit.answered(0.0, 100, delay_s)
        assert limit.calls == expected


def test_it_shrinks_once_a_round_trip_however_many_suffer() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=100)
    sent_at = clock.monotonic()
    clock.advance(1)
    for _ in range(100):
        limit.refused(sent_at)
    assert limit.calls == 50
    limit.refused(clock.monotonic())
    assert limit.calls == 25


def test_a_call_that_times_out_is_a_sign_of_too_much_unless_others_are_answered_without_a_queue() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=20)
    clock.advance(1)
    limit.timed_out(0.0)
    assert limit.calls == 10
    clock.advance(0.5)
    limit.answered(1.2, 1, 0.01)
    clock.advance(0.5)
    limit.timed_out(1.0)
    assert limit.calls == 10
    clock.advance(1)
    limit.timed_out(2.0)
    assert limit.calls == 5


def test_it_stays_between_floor_and_ceiling() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=10, floor=3, ceiling=12)
    for _ in range(100):
        limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert limit.calls == 12
    for _ in range(10):
        limit.refused(clock.monotonic())
    assert limit.calls == 3


def test_a_limit_that_is_not_used_is_not_raised() -> None:
    limit = a_limit(FakeClock(), initial=20)
    for _ in range(100):
        limit.answered(0.0, 9, 0.0)
    assert limit.calls == 20


def test_latency_above_the_least_one_seen_is_queue() -> None:
    clock = FakeClock()
    limit = a_limit(clock)
    assert limit.delay_s(0.2) == 0.0
    assert limit.delay_s(0.05) == 0.0
    assert limit.delay_s(0.25) == pytest.approx(0.2)
    clock.advance(60)
    assert limit.delay_s(0.25) == pytest.approx(0.197)  # A minute's queue is not the new normal,
    for _ in range(100):
        clock.advance(60)
        limit.delay_s(0.25)
    assert limit.delay_s(0.25) == pytest.approx(0.0, abs=0.02)  # an hour's is.
