"""Growth on virtual time: cores grow with replicas, the store does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lab.simulator.scale import Costs, limit_of, measure

SLOW = Costs(accept_s=1e-3, intake_s=1e-3, bureau_s=1e-3, scoring_s=1e-3, pricing_s=1e-3)
"""Slow cores, so that little has to be simulated."""


def test_twice_the_replicas_decide_twice_as_much_while_the_store_has_time() -> None:
    quick = replace(SLOW, commit_s=1e-5, row_s=1e-6)
    assert measure(2, quick).a_second == pytest.approx(2 * measure(1, quick).a_second, rel=0.15)


def test_a_store_without_time_left_is_the_limit() -> None:
    points = [measure(replicas, replace(SLOW, row_s=300e-6), warm_up_s=2.0, measured_s=2.0) for replicas in (1, 3)]
    assert points[0].store_busy < 0.9
    assert limit_of(points) == points[1]
    assert points[1].store_busy > 0.95
    assert points[1].a_second < 2 * points[0].a_second
