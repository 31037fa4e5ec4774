"""Rates between two looks at a mesh."""

from __future__ import annotations

from typing import Any

import pytest
from lending.ops.v1 import ops_service_pb2 as pb

from loanmesh.seeing.rates import Look, picture, quantile_ms

SUBMIT = "lending.intake.v1.IntakeService/SubmitApplication"
BOUNDS_S = (0.01, 0.1, 1.0)


def a_status(ok: list[int], shed: int = 0, instance: str = "intake-1-a", **more: Any) -> pb.GetStatusResponse:
    calls = [
        pb.CallCounts(method=SUBMIT, status="OK", counts=ok),
        pb.CallCounts(method=SUBMIT, status="RESOURCE_EXHAUSTED", counts=[shed, 0, 0, 0]),
        pb.CallCounts(method="lending.intake.v1.IntakeService/WatchApplication", status="OK", counts=[0, 0, 0, 9]),
    ]
    return pb.GetStatusResponse(service="intake", instance=instance, bounds_s=BOUNDS_S, calls=calls, **more)


def test_rates_are_the_difference_of_two_looks() -> None:
    before = {"a": Look(0.0, a_status([10, 0, 0, 0], decisions=5, accepted=10))}
    shut = pb.Dependency(name="dependencies/court", breaker_state=pb.BREAKER_STATE_OPEN, breaker_cause="9 of 10 failed")
    after = {"a": Look(2.0, a_status([20, 10, 0, 0], shed=4, decisions=25, accepted=30, backlog=7), [shut])}
    shown = picture(before, after)
    (row,) = shown.rows
    assert (row.calls, row.shed, row.errors) == (12.0, 2.0, 0.0)
    assert (shown.accepted, shown.decided, shown.backlog) == (10.0, 10.0, 7)
    assert row.p50_ms == pytest.approx(8.6, abs=0.1)
    assert shown.open == [{"dependency": "court", "state": "open", "cause": "9 of 10 failed", "at": "intake-1-a"}]


def test_a_process_that_was_started_again_has_no_rate_yet_and_one_that_is_gone_is_away() -> None:
    before = {"a": Look(0.0, a_status([500, 0, 0, 0])), "b": Look(0.0, a_status([1, 0, 0, 0], instance="intake-2-b"))}
    after = {"a": Look(1.0, a_status([3, 0, 0, 0], instance="intake-9-z")), "b": Look(1.0, None)}
    new, away = picture(before, after).rows
    assert (new.state, new.calls, new.p50_ms) == ("new", 0.0, None)
    assert (away.state, away.instance) == ("away", "intake-2-b")


def test_a_quantile_lies_within_its_bucket() -> None:
    assert quantile_ms([0, 0, 0, 0], BOUNDS_S, 0.5) is None
    assert quantile_ms([0, 10, 0, 0], BOUNDS_S, 0.5) == pytest.approx(55.0)
    assert quantile_ms([0, 0, 0, 10], BOUNDS_S, 0.95) == 1000.0


def test_what_rests_is_told_once_though_all_replicas_see_it() -> None:
    rest = pb.Resting(waiting_for="source_missing:court", applications=300)
    rest.retry_time.FromSeconds(1_800_000_000)
    after = {one: Look(1.0, a_status([0, 0, 0, 0], instance=one, resting=[rest])) for one in ("intake-1", "intake-2")}
    assert picture({}, after).resting == [
        {"waiting_for": "source_missing:court", "applications": 300, "retry_at": 1_800_000_000.0}
    ]
