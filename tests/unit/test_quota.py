"""A caller's quota: counted by itself, paid back in time, and nobody else's matter."""

from __future__ import annotations

import pytest

from services.intake.quota import CLIENTS_MAX, Allowance, Quota


def test_a_burst_passes_and_then_the_rate_holds() -> None:
    quota = Quota(10.0, 5)
    assert [quota.take("a", 1, 0.0) for _ in range(5)] == [0.0] * 5
    assert quota.take("a", 1, 0.0) == pytest.approx(0.1)
    assert quota.take("a", 1, 0.1) == 0.0
    assert sum(quota.take("a", 1, 0.2 + n * 0.01) == 0.0 for n in range(1000)) == pytest.approx(100, abs=6)


def test_one_caller_over_its_quota_is_no_matter_of_others() -> None:
    quota = Quota(1.0, 1)
    assert quota.take("a", 1, 0.0) == 0.0
    assert quota.take("a", 1, 0.0) > 0
    assert quota.take("b", 1, 0.0) == 0.0


def test_a_batch_beyond_the_rest_passes_once_and_is_paid_for() -> None:
    quota = Quota(10.0, 100)
    assert quota.take("a", 500, 0.0) == 0.0
    assert quota.take("a", 1, 1.0) == pytest.approx(39.1)
    assert quota.take("a", 1, 41.0) == 0.0


def test_without_a_rate_there_is_no_quota_and_callers_are_bounded() -> None:
    assert Quota(0.0, 1).take("a", 10**6, 0.0) == 0.0
    quota = Quota(1.0, 1)
    for number in range(CLIENTS_MAX + 5):
        quota.take(str(number), 1, 0.0)
    assert len(quota._left) == CLIENTS_MAX


def test_a_client_in_the_table_has_values_of_its_own_and_the_others_theirs() -> None:
    quota = Quota(1.0, 1, {"shop": Allowance(10.0, 3), "internal": Allowance(0.0, 1)})
    assert [quota.take("shop", 1, 0.0) for _ in range(3)] == [0.0] * 3
    assert quota.take("shop", 1, 0.0) == pytest.approx(0.1)
    assert quota.take("internal", 10**6, 0.0) == 0.0
    assert quota.take("other", 1, 0.0) == 0.0
    assert quota.take("other", 1, 0.0) == pytest.approx(1.0)
