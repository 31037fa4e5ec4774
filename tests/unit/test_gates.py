"""Gates: a refusal binds its class, for a sensible time, and a knock opens it again."""

from __future__ import annotations

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.gates import KNOCK_S, SHUT_S_MAX, WELCOME_S, YIELDS_S, Gates

INTERACTIVE, PARTNER, BULK = 0, 1, 2


def test_a_class_that_is_turned_away_twice_stays_away_longer_each_time_and_knocks_with_one_call() -> None:
    clock = FakeClock()
    gates = Gates(3, clock)
    gates.refused(PARTNER, clock.monotonic(), 0.3)
    assert gates.shut_s(PARTNER) == 0, "one replica of several may be full alone"
    shut_s = []
    for number in range(5):
        clock.advance(5)
        assert gates.shut_s(PARTNER) == 0
        gates.sent(PARTNER)
        gates.refused(PARTNER, clock.monotonic(), 0.3)
        shut_s.append(gates.shut_s(PARTNER))
        if number == 0:
            assert gates.shut_s(BULK) == gates.shut_s(PARTNER), "what is less urgent is not let in either"
        assert gates.shut_s(INTERACTIVE) == 0
    assert shut_s == pytest.approx([0.3, 0.6, 1.2, SHUT_S_MAX, SHUT_S_MAX])
    assert gates.shut_s(BULK) == 0, "it may find out for itself"
    clock.advance(SHUT_S_MAX)
    gates.sent(PARTNER)
    assert gates.opens_s(PARTNER) == KNOCK_S, "one knocks, and the next one when that one may hang"
    assert gates.shut_s(PARTNER) == 0, "which is no time that anybody is told"
    gates.answered(PARTNER)
    gates.sent(PARTNER)
    assert gates.opens_s(PARTNER) == 0
    gates.sent(BULK)
    assert gates.opens_s(BULK) > 0, "that one was let in says nothing of those who are in less of a hurry"
    gates.unheard(BULK)
    assert gates.opens_s(BULK) == 0, "it ended without an answer"


def test_a_refusal_now_and_then_shuts_nobody_out() -> None:
    clock = FakeClock()
    gates = Gates(3, clock)
    for call in range(1000):
        clock.advance(0.01)
        if call % 10:
            gates.answered(INTERACTIVE)
        else:
            gates.refused(INTERACTIVE, clock.monotonic(), 0.3)
        assert [gates.opens_s(urgency) for urgency in range(3)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("asked_s", "shut_s"), [(None, 0.2), (-1.0, 0.2), (0.0, 0.05), (5.0, SHUT_S_MAX), (float("inf"), SHUT_S_MAX)]
)
def test_a_whole_class_is_kept_away_for_a_sensible_time_whatever_is_said(asked_s: float | None, shut_s: float) -> None:
    clock = FakeClock()
    gates = Gates(3, clock)
    for _ in range(2):
        clock.advance(1)
        gates.refused(BULK, clock.monotonic(), asked_s)
    assert gates.shut_s(BULK) == pytest.approx(shut_s)


def test_what_was_under_way_before_says_nothing_new() -> None:
    clock = FakeClock()
    gates = Gates(3, clock)
    clock.advance(1)
    for sent_at in (0.5, 0.6, 0.7):
        gates.refused(BULK, sent_at, 0.5)
    assert gates.shut_s(BULK) == 0, "they were sent before the first was refused"
    gates.refused(BULK, 1.0, 0.5)
    gates.refused(BULK, 0.9, 0.5)
    assert gates.shut_s(BULK) == pytest.approx(0.5)


def test_who_stays_away_for_those_in_a_hurry_is_not_welcome_in_company_for_a_while() -> None:
    clock = FakeClock()
    gates = Gates(3, clock)
    clock.advance(1)
    gates.refused(PARTNER, clock.monotonic(), 0.1, yields=True)
    assert [gates.welcome(urgency) for urgency in range(3)] == [True, True, True], "one of several replicas says so"
    clock.advance(1)
    gates.refused(PARTNER, clock.monotonic(), 0.1, yields=True)
    clock.advance(WELCOME_S)
    gates.answered(PARTNER)
    clock.advance(YIELDS_S - WELCOME_S - 0.1)
    assert [gates.welcome(urgency) for urgency in range(3)] == [True, False, False]
    clock.advance(0.1)
    assert [gates.welcome(urgency) for urgency in range(3)] == [True, True, False], "bulk has not been let in yet"
    gates.answered(BULK)
    clock.advance(WELCOME_S)
    assert gates.welcome(BULK)
