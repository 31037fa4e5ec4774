"""The retry budget: bounds what is wasted, not what helps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import floats, lists, sampled_from, tuples

from loanmesh.runtime.budget import BudgetSettings, RetryBudget
from loanmesh.runtime.clock import FakeClock


def a_budget(clock: FakeClock, share: float = 0.1, reserve_per_s: float = 0.01, memory_s: float = 5.0) -> RetryBudget:
    return RetryBudget(BudgetSettings(share=share, reserve_per_s=reserve_per_s, memory_s=memory_s), clock)


def test_ten_calls_pay_for_one_retry() -> None:
    budget = a_budget(FakeClock())
    for _ in range(9):
        budget.first_attempt()
    assert budget.try_take() is None
    budget.first_attempt()
    assert budget.try_take()
    assert budget.try_take() is None


def test_a_caller_of_few_calls_has_a_reserve_that_fills_again() -> None:
    clock = FakeClock()
    budget = a_budget(clock, reserve_per_s=1)
    assert sum(budget.try_take() is not None for _ in range(20)) == 5
    clock.advance(1.2)
    assert sum(budget.try_take() is not None for _ in range(20)) == 1
    clock.advance(60)
    assert sum(budget.try_take() is not None for _ in range(20)) == 4


def test_what_calls_paid_for_leaks_away() -> None:
    clock = FakeClock()
    budget = a_budget(clock)
    for _ in range(1000):
        budget.first_attempt()
    assert budget.balance == pytest.approx(100, abs=0.1)
    clock.advance(5)
    assert budget.balance == pytest.approx(37, abs=0.3)
    clock.advance(60)
    assert budget.try_take() is None


def test_a_retry_that_was_answered_costs_nothing_and_pays_for_another() -> None:
    budget = a_budget(FakeClock(), reserve_per_s=0.2)
    for answered in range(100):
        assert budget.balance == pytest.approx(1 + answered)
        token = budget.try_take()
        assert token
        token.give_back()
        token.give_back()


@given(lists(tuples(sampled_from(["call", "retry"]), floats(0, 1.5)), max_size=300))
def test_no_more_is_wasted_than_promised(steps: list[tuple[str, float]]) -> None:
    clock = FakeClock()
    budget = a_budget(clock, share=0.05, reserve_per_s=0.5)
    calls = retries = 0
    for what, pause_s in steps:
        clock.advance(pause_s)
        if what == "call":
            budget.first_attempt()
            calls += 1
        elif budget.try_take():
            retries += 1
        assert retries <= 2.5 + 0.05 * calls + 0.5 * clock.monotonic() + 1e-6
        assert budget.balance > -1e-9


def test_a_retry_that_was_not_made_is_paid_back_in_full_and_no_more() -> None:
    budget = a_budget(FakeClock())
    for _ in range(10):
        budget.first_attempt()
    before = budget.balance
    token = budget.try_take()
    assert token
    token.not_used()
    token.not_used()
    token.give_back()
    assert budget.balance == pytest.approx(before)
