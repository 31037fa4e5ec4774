"""Traffic: arrivals as asked for, sent when due, measured from when they were due."""

from __future__ import annotations

import argparse
import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.traffic import (
    OK,
    Answer,
    Arrival,
    Record,
    arrivals,
    begin,
    play,
    promotion_day,
    ramp,
    report,
    spike,
    steady,
    steps,
    summarise,
)
from loanmesh.runtime.clock import FakeClock

EVERYBODY = {"interactive": 1.0, "partner": 2.0, "bulk": 7.0}


class PatientClock(FakeClock):
    """Lets what is ready run before time moves, as a real loop does."""

    async def sleep(self, seconds: float) -> None:
        until = self.monotonic() + seconds
        await super().sleep(0)
        await super().sleep(max(0.0, until - self.monotonic()))


async def acknowledge(number: int, arrival: Arrival) -> Answer:
    return Answer(OK)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first = arrivals(steady(50), 10, EVERYBODY, random.Random(7))
    assert first == arrivals(steady(50), 10, EVERYBODY, random.Random(7))
    assert first != arrivals(steady(50), 10, EVERYBODY, random.Random(8))


@given(st.integers(0, 1000), st.floats(1, 400), st.floats(0.1, 20))
def test_arrivals_are_in_order_and_within_their_time(seed: int, rate: float, seconds: float) -> None:
    times = [arrival.at_s for arrival in arrivals(steady(rate), seconds, EVERYBODY, random.Random(seed))]
    assert all(0 <= at < seconds for at in times)
    assert all(a <= b for a, b in pairwise(times))


def test_as_many_arrive_as_the_rate_says() -> None:
    # 10,000 expected: a Poisson count leaves 9,500 to 10,500 once in millions; the seed makes it never.
    assert 9_500 < len(arrivals(steady(1000), 10, {"bulk": 1}, random.Random(1))) < 10_500


def test_gaps_are_as_irregular_as_those_of_strangers() -> None:
    times = [arrival.at_s for arrival in arrivals(steady(1000), 10, {"bulk": 1}, random.Random(1))]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread / mean == pytest.approx(1, abs=0.05)


def test_a_spike_brings_its_factor_and_then_ends() -> None:
    times = [a.at_s for a in arrivals(spike(100, 10, from_s=5, for_s=10), 20, {"bulk": 1}, random.Random(1))]
    before, during, after = (sum(a <= at < b for at in times) for a, b in ((0, 5), (5, 15), (15, 20)))
    assert during / 10 == pytest.approx(1000, rel=0.05)
    assert (before + after) / 10 == pytest.approx(100, rel=0.1)


def test_steps_follow_one_another_and_the_last_goes_on() -> None:
    rate = steps([1, 2, 3], 10)
    assert [rate(at) for at in (0, 9.9, 10, 25, 1000)] == [1, 1, 2, 3, 3]


def test_a_ramp_rises_evenly_and_stays() -> None:
    rate = ramp(10, 110, 10)
    assert [rate(at) for at in (0, 5, 10, 20)] == [10, 60, 110, 110]


def test_a_promotion_day_peaks_at_twenty_hundred() -> None:
    rate = promotion_day(100, 10, 24)
    assert rate(19.9) < 200
    assert rate(20.0) == 1000
    assert max(rate(hour / 10) for hour in range(240)) == 1000


def test_classes_come_in_their_shares() -> None:
    found = arrivals(steady(1000), 10, EVERYBODY, random.Random(1))
    assert sum(a.kind == "bulk" for a in found) / len(found) == pytest.approx(0.7, abs=0.02)


def test_the_count_is_bounded() -> None:
    assert len(arrivals(steady(1000), 10, EVERYBODY, random.Random(1), count_max=17)) == 17


@pytest.mark.parametrize("mix", [{}, {"vip": 1.0}, {"bulk": 0.0}, {"bulk": -1.0, "partner": 3.0}])
def test_a_mix_that_makes_no_sense_is_refused(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"mix|class"):
        arrivals(steady(1), 1, mix, random.Random(1))


async def test_each_is_sent_when_it_is_due() -> None:
    clock = PatientClock()
    sent: list[float] = []

    async def send(number: int, arrival: Arrival) -> Answer:
        sent.append(clock.monotonic())
        return Answer(OK)

    await play([Arrival(at, "bulk") for at in (0.5, 1.0, 4.0)], send, clock)
    assert sent == [0.5, 1.0, 4.0]


async def test_generators_begin_together_and_one_that_is_not_ready_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    clock = FakeClock()
    now = clock.now().timestamp()
    await begin(argparse.Namespace(begin_at=now + 3.0), clock)
    assert clock.monotonic() == pytest.approx(3.0)
    await begin(argparse.Namespace(begin_at=0.0), clock)
    assert not capsys.readouterr().err
    await begin(argparse.Namespace(begin_at=now + 1.0), clock)
    assert clock.monotonic() == pytest.approx(3.0)
    assert "ready 2.0 s after --begin-at" in capsys.readouterr().err


async def test_a_stall_is_felt_by_all_who_would_have_come_during_it() -> None:
    clock = PatientClock()

    async def send(number: int, arrival: Arrival) -> Answer:
        if number == 0:
            clock.advance(10)  # Nothing moves for ten seconds.
        return Answer(OK)

    records = await play([Arrival(at, "bulk") for at in (1.0, 2.0, 6.0)], send, clock)
    assert [record.took_s for record in records] == [10.0, 9.0, 5.0]


async def test_arrivals_do_not_wait_for_answers() -> None:
    gate = asyncio.Event()
    under_way = 0

    async def send(number: int, arrival: Arrival) -> Answer:
        nonlocal under_way
        under_way += 1
        if under_way == 100:
            gate.set()
        await gate.wait()  # A closed loop would wait here for ever.
        return Answer(OK)

    records = await play([Arrival(i / 100, "bulk") for i in range(100)], send, FakeClock())
    assert len(records) == 100


async def test_what_memory_does_not_hold_counts_as_failed() -> None:
    gate = asyncio.Event()

    async def send(number: int, arrival: Arrival) -> Answer:
        await gate.wait()
        return Answer(OK)

    async def later() -> None:
        for _ in range(50):
            await asyncio.sleep(0)  # noqa: TID251  Lets the player run; no time passes.
        gate.set()

    opening = asyncio.create_task(later())
    records = await play([Arrival(i / 10, "bulk") for i in range(5)], send, FakeClock(), in_flight_max=3)
    await opening
    assert [record.answer.outcome for record in records] == [OK, OK, OK, "generator_full", "generator_full"]


async def test_every_arrival_has_a_record_in_order() -> None:
    due = arrivals(steady(500), 2, EVERYBODY, random.Random(3))
    records = await play(due, acknowledge, FakeClock())
    assert [(r.at_s, r.kind) for r in records] == [(a.at_s, a.kind) for a in due]


def a_record(took_s: float, outcome: str = OK, kind: str = "bulk", at_s: float = 0.0) -> Record:
    return Record(at_s, kind, 0.0, took_s, Answer(outcome))


def test_late_and_failed_ones_are_not_in_time() -> None:
    records = [*(a_record(0.1) for _ in range(7)), a_record(2.5), a_record(0.2, "unreachable"), a_record(0.2, "x")]
    found = summarise(records, seconds=2, deadline_s=2)
    assert (found.offered, found.acknowledged, found.in_time, found.failed) == (10, 8, 7, {"unreachable": 1, "x": 1})
    assert found.offered_a_second == 5
    assert found.in_time_a_second == 3.5


def test_what_is_answered_after_the_last_arrival_is_no_rate_that_was_kept_up() -> None:
    found = summarise([a_record(1.0, at_s=0.5), a_record(1.0, at_s=1.5)], seconds=2, deadline_s=2)
    assert (found.in_time, found.in_time_a_second) == (2, 0.5)


def test_percentiles_are_values_that_happened() -> None:
    found = summarise([a_record(i / 1000) for i in range(1, 101)], 1, 2)
    assert (found.p50_ms, found.p90_ms, found.p99_ms, found.max_ms) == (50, 90, 99, 100)


def test_nothing_acknowledged_has_no_latency() -> None:
    assert summarise([a_record(1, "unreachable")], 1, 2).p99_ms is None


def test_a_report_tells_classes_and_seconds_apart() -> None:
    found = report([a_record(0.1), a_record(0.1, "x", "interactive", at_s=2.3)], 3, 2)
    assert found["by_class"]["interactive"]["failed"] == {"x": 1}
    assert [slot["offered"] for slot in found["timeline"]] == [1, 0, 1]
    assert found["timeline"][2]["not"] == 1
