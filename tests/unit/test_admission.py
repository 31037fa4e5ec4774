"""The door: what can wait is turned away first, a caller over its quota alone, and nothing is counted for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.runtime import caller
from loanmesh.runtime.caller import Caller
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import Overloaded, OverQuota
from services.intake.admission import Admission
from services.intake.arrival import Arrivals
from services.intake.quota import Quota
from services.intake.servicer import IntakeServicer

INTERACTIVE, PARTNER, BULK, REASSESSMENT = 1, 2, 3, 4


def a_door(quota: Quota | None = None, clock: FakeClock | None = None) -> Admission:
    return Admission(1.0, Arrivals(), quota or Quota(0, 1), clock or FakeClock())


@pytest.mark.parametrize(
    ("queued_s", "let_in"),
    [
        (0.2, {INTERACTIVE, PARTNER, BULK, REASSESSMENT}),
        (0.4, {INTERACTIVE, PARTNER}),
        (0.8, {INTERACTIVE}),
        (1.1, set()),
    ],
)
def test_what_can_wait_is_turned_away_first(queued_s: float, let_in: set[int]) -> None:
    for priority in (INTERACTIVE, PARTNER, BULK, REASSESSMENT):
        if priority in let_in:
            a_door().let_in(priority, queued_s)
        else:
            with pytest.raises(Overloaded) as refused:
                a_door().let_in(priority, queued_s)
            assert refused.value.retry_s >= 0.2
            assert not refused.value.metadata, "nobody is in more of a hurry"


def arrive(door: Admission, clock: FakeClock, delay_s: float, count: int = 50) -> None:
    """So many calls that all queued before the door for so long."""
    for _ in range(count):
        sent_ms = round((clock.monotonic() - delay_s) * 1000) + 1_000_000
        door.arrived({"loanmesh-client": "app", "loanmesh-sent-ms": f"a1:{sent_ms}"})


def where_calls_queue(delay_s: float, busy: Callable[[], bool] = lambda: True) -> Admission:
    """A door before which calls queue for so long in the mean."""
    clock = FakeClock()
    door = Admission(1.0, Arrivals(), Quota(0, 1), clock, busy)
    clock.advance(10)
    arrive(door, clock, 0.0)
    arrive(door, clock, delay_s)
    return door


def test_while_somebody_waits_in_front_of_a_screen_what_can_wait_queues_for_less() -> None:
    clock = FakeClock()
    door = a_door(clock=clock)
    clock.advance(10)
    arrive(door, clock, 0.0)
    arrive(door, clock, 0.1)
    door.let_in(BULK, 0.1)
    door.let_in(INTERACTIVE, 0.1)
    for priority in (PARTNER, BULK):
        for queued_s in (0.0, 0.9):
            with pytest.raises(Overloaded) as refused:
                door.let_in(priority, queued_s)
            assert refused.value.metadata == {"yields_to": "interactive"}
    door.let_in(INTERACTIVE, 0.9)
    clock.advance(0.2)
    arrive(door, clock, 0.0)
    door.let_in(BULK, 0.2)  # Others have no queue: whatever it is that delays this one, it is not the door.
    clock.advance(1.1)
    arrive(door, clock, 0.1)
    door.let_in(BULK, 0.1)


def test_who_is_turned_away_where_nobody_in_a_hurry_had_to_queue_yields_to_nobody() -> None:
    door = where_calls_queue(0.0275)
    door.let_in(INTERACTIVE, 0.0)
    with pytest.raises(Overloaded) as refused:
        door.let_in(BULK, 0.0)
    assert not refused.value.metadata
    door = where_calls_queue(0.1, busy=lambda: False)
    door.let_in(INTERACTIVE, 0.0)
    with pytest.raises(Overloaded) as refused:
        door.let_in(BULK, 0.0, behind_s=0.9)
    assert not refused.value.metadata, "what delays calls is not of its making"


def test_a_time_that_no_queue_can_be_is_not_asked_of_anybody() -> None:
    with pytest.raises(Overloaded) as refused:
        a_door().let_in(INTERACTIVE, 30_000.0)
    assert refused.value.retry_s == 2.0


def test_it_is_crowded_for_a_while_after_those_in_a_hurry_had_to_queue() -> None:
    clock = FakeClock()
    door = a_door(clock=clock)
    for number in range(100):
        door.let_in(BULK, 0.2)
        door.let_in(INTERACTIVE, 0.2 if number % 10 == 0 else 0.02, behind_s=0.2)
    assert not door.crowded(), "one way in ten is slow, or a disk is: nobody queues"
    for _ in range(10):
        door.let_in(INTERACTIVE, 0.06)
    clock.advance(0.9)
    assert door.crowded()
    door.let_in(INTERACTIVE, 0.0)
    clock.advance(0.2)
    assert not door.crowded()
    clock.advance(60)
    door.let_in(INTERACTIVE, 0.06)
    assert not door.crowded(), "what was a minute ago says nothing"


def test_what_queues_now_counts_at_once_while_those_in_a_hurry_come_in() -> None:
    busy = True
    door = where_calls_queue(0.035, lambda: busy)
    assert not door.crowded(), "nobody is in a hurry"
    door.let_in(INTERACTIVE, 0.0)
    assert door.crowded()
    busy = False
    assert not door.crowded()


def test_before_it_is_crowded_partners_queue_as_long_as_nobody_in_a_hurry_is_held_up() -> None:
    door = where_calls_queue(0.028)
    door.let_in(INTERACTIVE, 0.0)
    assert not door.crowded()
    door.let_in(PARTNER, 0.0)
    with pytest.raises(Overloaded):
        door.let_in(BULK, 0.0)


@pytest.mark.parametrize(
    ("queued_s", "partner", "bulk"), [(0.012, True, True), (0.02, True, False), (0.029, False, False)]
)
def test_while_it_is_crowded_what_can_wait_queues_for_less_still(queued_s: float, partner: bool, bulk: bool) -> None:
    clock = FakeClock()
    door = a_door(clock=clock)
    clock.advance(10)
    for _ in range(20):
        door.let_in(INTERACTIVE, 0.1)
    assert door.crowded()
    arrive(door, clock, 0.0)
    arrive(door, clock, queued_s)
    for priority, let_in in ((PARTNER, partner), (BULK, bulk)):
        if let_in:
            door.let_in(priority, 0.0)
        else:
            with pytest.raises(Overloaded):
                door.let_in(priority, 0.0)


def test_a_replica_with_time_to_spare_turns_nobody_away_for_delays_that_are_not_its_own() -> None:
    busy = False
    door = where_calls_queue(0.1, lambda: busy)
    for _ in range(10):
        door.let_in(INTERACTIVE, 0.1)
        door.let_in(BULK, 0.1)
    assert not door.crowded()
    busy = True
    assert door.crowded()
    with pytest.raises(Overloaded):
        door.let_in(BULK, 0.1)


def test_a_caller_over_its_quota_is_told_when_to_come_back_and_nobody_else() -> None:
    door = a_door(Quota(2.0, 1))
    door.pay("greedy", 1)
    with pytest.raises(OverQuota) as refused:
        door.pay("greedy", 1)
    assert 0 < refused.value.retry_s <= 0.5
    assert "its quota of 2 applications a second, 1 at once" in str(refused.value)
    assert "there is room again in 0.5 s" in str(refused.value)
    door.pay("modest", 1)


def test_the_queue_before_the_door_is_told_from_the_senders_clock() -> None:
    clock = FakeClock()
    door = a_door(clock=clock)
    assert door.arrived({"loanmesh-client": "app", "loanmesh-sent-ms": "a1:5000"}) == ("app", 0.0)
    clock.advance(1.0)
    client, delay_s = door.arrived({"loanmesh-client": "app", "loanmesh-sent-ms": "a1:5400"})
    assert client == "app"
    assert delay_s == pytest.approx(0.6)


async def test_what_is_assessed_again_counts_as_what_is_new() -> None:
    door = a_door(Quota(0.001, 1))
    door.pay("greedy", 1)
    nobody = cast(Any, None)
    servicer = IntakeServicer(
        nobody, nobody, nobody, nobody, nobody, nobody, {}, FakeClock(), str, accepts_waiting_max=1, admission=door,
    )  # fmt: skip
    supplied = pb.SupplyInformationRequest(name="lenders/demo/applications/x", product="consumer_instalment")
    caller.note_said({"loanmesh-client": "greedy"})
    with pytest.raises(OverQuota):
        await servicer.SupplyInformation(supplied, nobody)


def test_nobody_sets_the_clock_of_another_caller() -> None:
    clock = FakeClock()
    door = a_door(clock=clock)
    door.arrived({"loanmesh-client": "app", "loanmesh-sent-ms": "a1:5000"})
    door.arrived({"loanmesh-client": "rival", "loanmesh-sent-ms": "a1:999999999"})
    clock.advance(1.0)
    assert door.arrived({"loanmesh-client": "app", "loanmesh-sent-ms": "a1:6000"}) == ("app", 0.0)


def test_what_is_proven_of_a_caller_goes_before_what_it_says() -> None:
    try:
        caller.note(Caller("client/shop", "certificate"))
        assert a_door().arrived({"loanmesh-client": "somebody-else"})[0] == "shop"
        caller.note(Caller("operator/shop", "token"))
        assert a_door().arrived({"loanmesh-client": "shop"})[0] == "operator/shop"
    finally:
        caller.note(None)
    assert a_door().arrived({"loanmesh-client": "shop"})[0] == "shop"
