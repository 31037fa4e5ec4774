"""Promotions: the file, what follows from it, and what an autoscaler makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis.strategies import floats, integers, lists

from loanmesh.promotion.autoscaler import SYNC_S, Autoscaler, Behaviour
from loanmesh.promotion.capacity import SERVICES, Capacity, as_yaml, from_bench, read_capacity
from loanmesh.promotion.demand import arrivals, rate_needed, source_bounds, wait_s
from loanmesh.promotion.file import Promotion, read_promotion
from loanmesh.promotion.plan import make_plan
from loanmesh.promotion.simulate import ARRIVALS_WINDOW_S, DRAIN_S
from loanmesh.promotion.waiting import Waiting, percentiles
from loanmesh.promotion.wrong import WrongFile
from services.intake.scaler import WINDOW_S
from services.intake.settings import ScalerSettings
from tests.promotions import a_capacity, a_promotion

SAMPLES = Path(__file__).parents[2] / "deploy" / "promotions"


# --- The file ---


@pytest.mark.parametrize("name", ["double-twelve.yaml", "small.yaml"])
def test_the_samples_can_be_read(name: str) -> None:
    assert read_promotion(SAMPLES / name).name == name.removesuffix(".yaml")


def read_changed(tmp_path: Path, path: str, value: Any) -> Promotion:
    """The larger sample with one value changed, or taken away for None."""
    said = yaml.safe_load((SAMPLES / "double-twelve.yaml").read_text(encoding="utf-8"))
    *way, last = path.split("/")
    place = said
    for step in way:
        place = place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    file = tmp_path / "promotion.yaml"
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    return read_promotion(file)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("channels/app/peak_a_second", -3, "channels.app.peak_a_second: is '-3'; must be greater than 0"),
        ("channels/app/peak_a_second", "many", "channels.app.peak_a_second: is 'many'; must be a valid number"),
        ("channels/app/peak_a_second", float("nan"), "channels.app.peak_a_second: is 'nan'; must be a finite number"),
        ("channels/app/kinds", {"person": 0.5}, "channels.app: kinds must add up to 1, not 0.5"),
        ("channels/app/kinds", {"cat": 1.0}, "channels.app.kinds.cat: is 'cat'; must be 'person' or 'firm'"),
        ("channels", {}, "channels: Dictionary should have at least 1 item"),
        ("timezone", "Mars/Olympus", "timezone: is 'Mars/Olympus'; must be a time zone such as Asia/Shanghai"),
        ("timezone", "../../etc/passwd", "timezone: is '../../etc/passwd'; must be a time zone"),
        ("start", "2026-12-12T20:00:00+08:00", "must have no offset; `timezone` says which clock it is of"),
        ("end", "2026-12-12T19:00:00", "the file: end must be after start and within 14 days of it"),
        ("peak_s", 1e6, "the file: peak_s must not be longer than from start to end, 12600 s"),
        ("name", "Double Twelve", "name: is 'Double Twelve'; must be lower-case letters, digits and hyphens"),
        ("decide_within_s", None, "decide_within_s: is missing"),
        ("decide_in_s", 3, "decide_in_s: there is no such field"),
        ("sources/tax/asked_for", [], "sources.tax.asked_for: List should have at least 1 item"),
        ("databases/intake/reserved", 400, "databases.intake: reserved, 400, must be less than max_connections, 400"),
        ("databases/loans", {"max_connections": 5}, "databases.loans: is 'loans'; must be 'intake' or 'bureau'"),
        ("replicas/bureau", None, "the file: replicas must name bureau"),
        ("replicas/bureau/most", 1, "replicas.bureau: most, 1, must not be less than usual, 2"),
        ("utilisation", 1.5, "utilisation: is '1.5'; must be less than or equal to 1"),
        ("channels", 7, "channels: must be fields with values, `name: value`"),
    ],
)
def test_a_wrong_value_is_told_by_field_value_and_rule(path: str, value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(WrongFile) as wrong:
        read_changed(tmp_path, path, value)
    assert says in str(wrong.value)
    assert str(tmp_path / "promotion.yaml") in str(wrong.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe\x00", "cannot be read: it is no UTF-8 text"),
        (b"a: [1", "is no YAML: "),
        (b"- 1\n", "the file: must be fields with values"),
        (b"", "the file: must be fields with values"),
        (b"[" * 5000, "1:33: lists and mappings nest deeper than 32"),
    ],
)
def test_what_is_no_promotion_is_told(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "promotion.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WrongFile, match=r"promotion\.yaml") as wrong:
        read_promotion(file)
    assert says in str(wrong.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "promotion.yaml"
    file.write_text("name: x\nboot_s: -1\nutilisation: 7\n", encoding="utf-8")
    with pytest.raises(WrongFile) as wrong:
        read_promotion(file)
    assert {problem.split(":")[0] for problem in wrong.value.problems} >= {"boot_s", "utilisation", "channels", "start"}


def test_a_night_without_an_hour_is_an_hour_shorter() -> None:
    one = a_promotion(timezone="Europe/Berlin", start="2027-03-28T01:00:00", end="2027-03-28T04:00:00")
    assert one.length_s == 2 * 3600


# --- What a replica does ---


def test_what_is_shipped_is_what_intake_tells_keda() -> None:
    shipped = {name: read_capacity().a_second(name, 1.0) for name in SERVICES}
    assert ScalerSettings().rates == pytest.approx(shipped, rel=0.05)


def test_the_simulator_asks_as_keda_does_by_default() -> None:
    assert (ScalerSettings().drain_s, WINDOW_S) == (DRAIN_S, ARRIVALS_WINDOW_S)
    assert a_promotion().utilisation == ScalerSettings().utilisation


def a_bench(**core: Any) -> dict[str, Any]:
    cold = {"intake": 1.5, "bureau": 1.9, "scoring": 0.25, "pricing": 0.43}
    warm = {"intake": 1.1, "bureau": 0.0, "scoring": 0.17, "pricing": 0.33}
    rounds = {
        "one by one, cold": {"cpu_ms": cold},
        "one by one, warm": {"cpu_ms": warm},
        "accepts one by one": {"cpu_ms": {"intake": 0.7}},
    }
    machine = {"cores": 2, "kind": "x86_64", "python": "3.11.7"}
    return {"quick": False, "machine": machine, "measured": {"core": rounds | core}}


def written(tmp_path: Path, said: object) -> Path:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(said), encoding="utf-8")
    return file


def test_deciding_is_what_intake_costs_beyond_accepting(tmp_path: Path) -> None:
    capacity = from_bench(written(tmp_path, a_bench()))
    assert capacity.cpu_ms["intake"].cold == capacity.cpu_ms["intake"].warm == 0.7
    assert capacity.cpu_ms["intake-worker"].cold == pytest.approx(0.8)
    assert capacity.cpu_ms["bureau"].warm == 0.01, "what is too little to be measured is not nothing"
    assert capacity.a_second("intake-worker", 1.0) == pytest.approx(1250)
    assert capacity.a_second("bureau", 0.5) == pytest.approx(1000 / (0.5 * 1.9 + 0.5 * 0.01))


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    capacity = from_bench(written(tmp_path, a_bench()))
    (tmp_path / "capacity.yaml").write_text(as_yaml(capacity), encoding="utf-8")
    assert read_capacity(tmp_path / "capacity.yaml") == capacity


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({**a_bench(), "quick": True}, "comes from a quick run"),
        ({"quick": False}, "has no 'measured'"),
        (a_bench(**{"one by one, cold": {}}), "has no 'cpu_ms'"),
        ([], "`make bench ONLY=core` writes"),
    ],
)
def test_a_benchmark_that_says_too_little_is_told(said: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(WrongFile) as wrong:
        from_bench(written(tmp_path, said))
    assert says in str(wrong.value)


# --- How many come, and how fast they must be decided ---


def test_everybody_comes_at_the_start_and_fades_to_the_usual() -> None:
    rate = arrivals(a_promotion(usual=10, peak=110, peak_s=600, length_s=1600), scale=2)
    assert [rate(at_s) for at_s in (-1, 0, 599, 1100, 1600, 9999)] == [20, 220, 220, 120, 20, 20]


def test_a_source_bounds_by_how_often_it_is_asked() -> None:
    one = a_promotion(
        new_subjects=0.5,
        channels={
            "app": {"usual_a_second": 0, "peak_a_second": 75},
            "bank": {"usual_a_second": 0, "peak_a_second": 25, "kinds": {"firm": 1.0}},
        },
        sources={"tax": {"a_second": 60, "asked_for": ["firm"]}, "court": {"a_second": 60}},
    )
    assert source_bounds(one) == pytest.approx({"tax": 60 / (0.5 * 0.25), "court": 120})
    assert source_bounds(one, {"tax": 5})["tax"] == pytest.approx(5 / 0.125)
    never = a_promotion(new_subjects=0.0, sources={"tax": {"a_second": 1}})
    assert source_bounds(never) == {}


def test_a_short_peak_needs_less_than_its_height() -> None:
    """A hundred a second for a minute, decided within another minute, is fifty a second for two."""
    one = a_promotion(usual=0, peak=100, peak_s=60, length_s=60, decide_within_s=60)
    assert rate_needed(one, 1.0, 60) == pytest.approx(50, rel=0.03)
    assert wait_s(one, 1.0, 50) == pytest.approx(60, rel=0.03)
    assert wait_s(one, 1.0, 200) < 0.1


def test_a_long_peak_needs_its_height() -> None:
    one = a_promotion(usual=0, peak=100, peak_s=36_000, length_s=36_000)
    assert rate_needed(one, 1.0, 60) == pytest.approx(100, rel=0.01)


def test_what_is_never_worked_off_takes_for_ever() -> None:
    assert wait_s(a_promotion(usual=10, peak=100), 1.0, 0.5) == math.inf


def test_the_less_urgent_wait_for_the_urgent() -> None:
    channels = {
        "app": {"usual_a_second": 0, "peak_a_second": 50},
        "bulk": {"usual_a_second": 0, "peak_a_second": 50, "priority": "bulk"},
    }
    mixed = a_promotion(channels=channels, peak_s=60, length_s=60)
    alike = a_promotion(usual=0, peak=100, peak_s=60, length_s=60)
    assert wait_s(mixed, 1.0, 50) > wait_s(alike, 1.0, 50)


def test_the_urgent_go_first_but_one_place_in_five_goes_by_age() -> None:
    waiting = Waiting()
    waiting.add(2, 0.0, 100)
    waiting.add(0, 1.0, 100)
    taken = waiting.take(50)
    assert taken == [(0.0, 10), (1.0, 40)]
    assert waiting.count == 150


@settings(deadline=None)
@given(lists(integers(0, 50), min_size=1, max_size=20), floats(0.1, 100))
def test_nothing_that_waits_is_lost_or_taken_twice(came: list[int], each: float) -> None:
    waiting = Waiting()
    for number, count in enumerate(came):
        waiting.add(number % 3, float(number), float(count))
    taken = 0.0
    while waiting.count > 0:
        part = sum(count for _, count in waiting.take(each))
        assert part > 0
        taken += part
    assert taken == pytest.approx(sum(came))


def test_percentiles_count_how_many_waited() -> None:
    assert percentiles([(10.0, 1), (1.0, 98), (5.0, 1)]) == {"p50": 1.0, "p90": 1.0, "p99": 5.0, "max": 10.0}
    assert percentiles([]) == {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}


# --- The plan ---


def test_replicas_are_load_over_rate_and_utilisation_and_never_fewer_than_usual() -> None:
    plan = make_plan(a_promotion(usual=0, peak=350, utilisation=0.7), a_capacity(a_second=100))
    assert plan.holds
    assert plan.needed_a_second == pytest.approx(350, rel=0.02)
    assert {name: one.replicas for name, one in plan.services.items()} == dict.fromkeys(SERVICES, 5)
    small = make_plan(a_promotion(usual=0, peak=1), a_capacity(a_second=100))
    assert {one.replicas for one in small.services.values()} == {2}


def test_a_quota_bounds_who_decides_and_not_who_accepts() -> None:
    plan = make_plan(a_promotion(peak=1000, sources={"tax": {"a_second": 100}}), a_capacity(a_second=100))
    assert (plan.holds, plan.bound_by, plan.decides_a_second) == (False, "quota of tax", 100)
    assert plan.services["intake"].replicas == 15
    for name in SERVICES[1:]:
        assert plan.services[name].replicas == plan.services[name].most == 2, "more replicas than the quota feeds"
    (problem,) = plan.problems
    assert "tax lets 100 a second be decided" in problem.what
    assert "ask tax for 9" in problem.do


def test_another_quota_makes_it_hold() -> None:
    limited = a_promotion(peak=1000, sources={"tax": {"a_second": 100}})
    plan = make_plan(limited, a_capacity(a_second=100), quotas={"tax": 1000})
    assert plan.holds
    assert plan.bound_by is None


def test_autoscalers_may_go_as_far_as_connections_reach() -> None:
    one = a_promotion(peak=350, databases={"intake": {"max_connections": 100, "reserved": 10, "a_replica": 4}})
    plan = make_plan(one, a_capacity(a_second=100))
    used = plan.connections["intake"]
    # 90 connections are 22 replicas, of which two are kept for a rollout.
    assert plan.services["intake"].most + plan.services["intake-worker"].most == 20
    assert (used.planned, used.most, used.available, used.fits) == (48, 88, 90, True)


def test_too_few_connections_are_a_problem_with_a_way_out() -> None:
    one = a_promotion(peak=350, databases={"intake": {"max_connections": 40, "reserved": 10, "a_replica": 4}})
    plan = make_plan(one, a_capacity(a_second=100))
    (problem,) = plan.problems
    assert problem.what == "intake's database has 30 connections to give, the plan needs 48"
    assert problem.do == "raise max_connections to 58, or put a pooler before it"
    assert plan.bound_by == "connections of intake's database"


def test_the_lead_covers_climbing_and_booting() -> None:
    assert make_plan(a_promotion(peak=10), a_capacity(a_second=100)).lead_s == 600
    slow = make_plan(a_promotion(peak=10, boot_s=900), a_capacity(a_second=100))
    assert slow.lead_s >= 900 * 1.5


@settings(max_examples=6, deadline=None)
@given(floats(1, 5000), integers(10, 7200), floats(1, 600), floats(10, 2000))
def test_what_is_planned_decides_in_time(peak: float, length_s: int, within_s: float, a_second: float) -> None:
    one = a_promotion(usual=0, peak=peak, length_s=length_s, decide_within_s=within_s)
    plan = make_plan(one, a_capacity(a_second=a_second))
    assert plan.decided_within_s <= within_s * 1.001
    for name in SERVICES[1:]:
        assert plan.services[name].replicas * a_second * one.utilisation >= plan.decides_a_second * 0.999


# --- The autoscaler ---


def test_within_the_tolerance_nothing_changes() -> None:
    scaler = Autoscaler(1, 100)
    assert scaler.replicas(0, 10, [10.9]) == 10
    assert scaler.replicas(15, 10, [11.1]) == 12


def test_of_several_metrics_the_largest_counts() -> None:
    assert Autoscaler(1, 100).replicas(0, 5, [3.0, 9.0, 7.5]) == 9


def test_up_goes_threefold_a_period_or_by_four() -> None:
    scaler, replicas, seen = Autoscaler(1, 1000), 2, []
    for look in range(5):
        replicas = scaler.replicas(look * SYNC_S, replicas, [500.0])
        seen.append(replicas)
    assert seen == [6, 18, 54, 162, 486]
    assert Behaviour().climb_s(2, 162) == 4 * SYNC_S
    assert Behaviour().climb_s(5, 5) == 0


def test_two_looks_within_a_period_do_not_go_twice_as_far() -> None:
    scaler = Autoscaler(1, 1000)
    first = scaler.replicas(0, 2, [500.0])
    assert scaler.replicas(5, first, [500.0]) == first


def test_down_waits_for_the_window_and_goes_slowly() -> None:
    scaler, replicas = Autoscaler(1, 100), 50
    replicas = scaler.replicas(0, replicas, [50.0])
    seen = {}
    for look in range(1, 60):
        replicas = scaler.replicas(look * SYNC_S, replicas, [1.0])
        seen[look * SYNC_S] = replicas
    assert seen[300.0] == 50
    assert seen[315.0] == 45
    assert seen[360.0] == 45
    assert seen[375.0] == 40


def test_least_and_most_hold_whatever_is_asked() -> None:
    assert Autoscaler(3, 8).replicas(0, 5, [100.0]) == 8
    assert Autoscaler(3, 8).replicas(0, 3, [0.0]) == 3


def test_a_capacity_that_lacks_a_service_is_told(tmp_path: Path) -> None:
    said = a_capacity().model_dump(mode="json")
    del said["cpu_ms"]["bureau"]
    file = tmp_path / "capacity.yaml"
    file.write_text(yaml.safe_dump(said), encoding="utf-8")
    with pytest.raises(WrongFile, match="cpu_ms: bureau is missing"):
        read_capacity(file)
    assert isinstance(a_capacity(), Capacity)
