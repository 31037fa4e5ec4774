"""The queue before the door: told from how much later a request comes than the quickest did."""

from __future__ import annotations

import pytest

from services.intake.arrival import FORGET_S, SENDERS_MAX, Arrivals, read_sent


def test_what_exceeds_the_quickest_way_is_queue() -> None:
    arrivals = Arrivals()
    assert arrivals.delay_s("a", 100.0, 5000.2) == 0.0
    assert arrivals.delay_s("a", 101.0, 5001.1) == 0.0  # A quicker way.
    assert arrivals.delay_s("a", 102.0, 5002.6) == pytest.approx(0.5)


def test_clocks_need_not_agree_and_senders_are_apart() -> None:
    arrivals = Arrivals()
    arrivals.delay_s("a", 0.0, 1000.0)
    assert arrivals.delay_s("b", 9e5, 1000.0) == 0.0
    assert arrivals.delay_s("a", 1.0, 1001.3) == pytest.approx(0.3)


def test_an_old_quickest_way_is_forgotten_where_clocks_drift() -> None:
    arrivals = Arrivals()
    arrivals.delay_s("a", 0.0, 0.0)
    for second in range(1, int(3 * FORGET_S)):
        delay_s = arrivals.delay_s("a", float(second), second + 2.0)
    assert delay_s == 0.0


def come(arrivals: Arrivals, now: float, *delays_s: float) -> None:
    for delay_s in delays_s:
        arrivals.delay_s("a", now - delay_s, now)


def test_a_standing_queue_presses_and_ends_by_itself() -> None:
    arrivals = Arrivals()
    come(arrivals, 10.0, 0.0)
    for tenth in range(10):
        come(arrivals, 10.3 + tenth / 10, 0.1, 0.4)
    assert arrivals.pressed(11.3)
    assert not arrivals.pressed(12.0)
    come(arrivals, 13.0, 0.3)
    assert not arrivals.pressed(13.0)


def test_callers_who_hold_back_press_and_that_ends_by_itself() -> None:
    arrivals = Arrivals()
    for call in range(60):
        arrivals.held_back(0.0 if call % 3 == 0 else 1.0, 10.0)
    assert arrivals.pressed(10.1)
    assert not arrivals.pressed(11.0)
    arrivals.held_back(1.0, 12.0)
    assert not arrivals.pressed(12.0), "one that was sent late for a reason of its own"


def test_a_caller_that_makes_up_how_long_it_held_a_call_presses_nobody() -> None:
    arrivals = Arrivals()
    arrivals.held_back(1e12, 10.0)
    assert not arrivals.pressed(10.1)


def test_a_burst_does_not_press_however_long_its_last_had_to_wait() -> None:
    arrivals = Arrivals()
    for tenth in range(30):
        come(arrivals, 10.0 + tenth / 10, 0.0, 0.05, 0.1, 0.3)
        assert not arrivals.pressed(10.0 + tenth / 10)


def test_how_long_calls_queue_in_the_mean_is_no_single_callers_doing() -> None:
    arrivals = Arrivals()
    for call in range(100):
        now = 10.0 + call / 100
        come(arrivals, now, 0.0)
        if call % 25 == 0:
            arrivals.delay_s("a liar", now - 1e6 * (call > 0), now)
    assert arrivals.usual_s(11.0) < 0.03
    for call in range(50):
        come(arrivals, 11.0 + call / 100, 0.06)
        arrivals.delay_s("a", 11.0 + call / 100 - 30.0, 11.0 + call / 100, usual=False)
    assert arrivals.usual_s(11.5) == pytest.approx(0.06, abs=0.01)
    assert arrivals.usual_s(12.5) == 0.0


def test_senders_are_bounded() -> None:
    arrivals = Arrivals()
    for number in range(SENDERS_MAX + 10):
        arrivals.delay_s(str(number), 0.0, 0.0)
    assert len(arrivals._least) == SENDERS_MAX


@pytest.mark.parametrize("said", ["", "abc", ":5", "a:", "a:x", "a:-5", "a:\u0665", "a:" + "9" * 40])
def test_what_is_no_time_is_not_read(said: str) -> None:
    assert read_sent(said) is None
    assert read_sent("a:1500") == ("a", 1.5, 0.0)
    assert read_sent("a:1500:250") == ("a", 1.5, 0.25)
