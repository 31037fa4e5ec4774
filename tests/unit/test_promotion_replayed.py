"""A promotion lived through on a virtual clock: what must come out of it, whatever the figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from loanmesh.promotion.capacity import Service
from loanmesh.promotion.file import Promotion
from loanmesh.promotion.picture import draw
from loanmesh.promotion.plan import make_plan
from loanmesh.promotion.simulate import Replayed, Scaling, replay
from tests.promotions import a_capacity, a_promotion

CAPACITY = a_capacity(a_second=100)


def lived(promotion: Promotion, scaling: Scaling = "keda", *, planned: bool = True, seed: int = 1) -> Replayed:
    plan = make_plan(promotion, CAPACITY)
    return replay(promotion, CAPACITY, plan, scaling=scaling, planned=planned, seed=seed)


@pytest.mark.parametrize("scaling", ["keda", "hpa", "none"])
def test_a_plan_that_holds_on_paper_holds_when_lived_through(scaling: Scaling) -> None:
    day = lived(a_promotion(usual=10, peak=1000, peak_s=600, length_s=1200), scaling)
    assert day.problems == ()
    assert day.drained_at_s is not None


@pytest.mark.parametrize("scaling", ["keda", "hpa"])
def test_autoscalers_alone_come_too_late_for_a_sudden_peak(scaling: Scaling) -> None:
    one = a_promotion(usual=10, peak=2000, peak_s=600, length_s=1200)
    planned, alone = lived(one, scaling), lived(one, scaling, planned=False)
    assert planned.holds
    assert not alone.holds
    assert alone.backlog_peak > 10 * planned.backlog_peak
    assert alone.drained_at_s is not None, "but nothing is lost, and all is made up for"


def test_the_backlog_is_what_came_less_what_the_quota_let_be_decided() -> None:
    """Ten minutes of 100 a second against 40: 36,000 wait, and take 900 seconds."""
    one = a_promotion(usual=0, peak=100, length_s=600, sources={"tax": {"a_second": 40}})
    day = lived(one, "none")
    assert day.came == pytest.approx(60_000, rel=0.02)
    assert day.backlog_peak == pytest.approx(36_000, rel=0.02)
    assert day.backlog_peak_at_s == pytest.approx(600, abs=2)
    assert day.drained_at_s == pytest.approx(1500, rel=0.02)
    assert day.decided_s["max"] == pytest.approx(900, rel=0.02)
    assert day.decided_s["p50"] == pytest.approx(450, rel=0.03)


@pytest.mark.parametrize("step_s", [1.0, 0.1, 0.05])
def test_as_many_come_however_finely_time_is_cut(step_s: float) -> None:
    one = a_promotion(usual=0, peak=5000, length_s=4)
    came = replay(one, CAPACITY, make_plan(one, CAPACITY), scaling="none", step_s=step_s).came
    assert came == pytest.approx(20_000, rel=0.015)


def test_the_same_seed_is_the_same_day_and_another_is_another() -> None:
    one = a_promotion(peak=300, length_s=600)
    assert dataclasses.asdict(lived(one)) == dataclasses.asdict(lived(one))
    assert lived(one, seed=2).came != lived(one).came


def test_pods_take_their_time_to_boot() -> None:
    """Nobody planned, so that all begins at the start: what boots for two minutes cannot serve in the first."""
    slow = lived(a_promotion(usual=10, peak=1000, length_s=1200, boot_s=200), planned=False)
    fast = lived(a_promotion(usual=10, peak=1000, length_s=1200, boot_s=10), planned=False)
    assert slow.backlog_peak + slow.acknowledged_s_max > fast.backlog_peak + fast.acknowledged_s_max
    series = slow.series
    booted = [n for at_s, n in zip(series.at_s, series.replicas["bureau"], strict=True) if 0 <= at_s < 150]
    assert set(booted) == {2}


def test_replicas_are_there_when_it_starts() -> None:
    one = a_promotion(usual=10, peak=1000, peak_s=600, length_s=3 * 3600)
    series = lived(one).series
    at_start: dict[Service, int] = {
        name: next(n for at_s, n in zip(series.at_s, line, strict=True) if at_s >= 0)
        for name, line in series.replicas.items()
    }
    assert at_start == {name: planned.replicas for name, planned in make_plan(one, CAPACITY).services.items()}


def test_too_few_acceptors_are_told() -> None:
    one = a_promotion(usual=10, peak=1000, length_s=600)
    plan = make_plan(one, CAPACITY)
    fewer = dataclasses.replace(plan.services["intake"], replicas=2, most=2)
    starved = dataclasses.replace(plan, services={**plan.services, "intake": fewer})
    day = replay(one, CAPACITY, starved, scaling="none")
    assert any("for an acknowledgement" in problem for problem in day.problems)


def test_a_long_day_keeps_few_points() -> None:
    day = lived(a_promotion(usual=1, peak=2, length_s=4 * 3600), "none")
    lengths = {len(day.series.at_s), len(day.series.backlog), *(len(line) for line in day.series.replicas.values())}
    assert len(lengths) == 1
    assert lengths.pop() <= 1200


def test_time_cut_too_finely_is_refused() -> None:
    one = a_promotion()
    with pytest.raises(ValueError, match="step_s must be at least"):
        replay(one, CAPACITY, make_plan(one, CAPACITY), step_s=0.001)


def test_the_same_day_is_the_same_picture(tmp_path: Path) -> None:
    one = a_promotion(usual=10, peak=1000, length_s=600)
    day = lived(one, planned=False)
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, one, day, "keda, unplanned")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    draw(tmp_path / "a.png", one, day, "keda, unplanned")
