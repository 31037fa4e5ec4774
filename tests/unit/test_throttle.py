"""The throttle: finds what the other side can take, shrinks once a round trip, and never lets anyone wait in vain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random

import pytest

from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.errors import Overloaded
from loanmesh.runtime.throttle import (
    COMPANY,
    KNOCK_S,
    SHUT_S_MAX,
    WELCOME_S,
    AdaptiveLimit,
    Gates,
    Permit,
    Throttle,
    ThrottleSettings,
)
from tests.virtual import VirtualClock, run

INTERACTIVE, PARTNER, BULK = 0, 1, 2


def a_limit(clock: FakeClock, **settings: float) -> AdaptiveLimit:
    return AdaptiveLimit(ThrottleSettings.model_validate(settings), clock)


def test_it_doubles_a_round_trip_until_the_first_queue_and_then_feels_its_way() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=4, ceiling=1000)
    for _ in range(4):
        for _ in range(limit.calls):
            limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert limit.calls == 64
    limit.answered(clock.monotonic(), 64, 0.11)
    clock.advance(0.1)
    before = limit.calls
    for _ in range(before):
        limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert before + 4 <= limit.calls <= before + 9


def test_it_shrinks_in_proportion_and_at_most_by_half() -> None:
    for delay_s, expected in ((0.105, 90), (0.15, 66), (5.0, 50)):
        limit = a_limit(FakeClock(), initial=100)
        limit.answered(0.0, 100, delay_s)
        assert limit.calls == expected


def test_it_shrinks_once_a_round_trip_however_many_suffer() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=100)
    sent_at = clock.monotonic()
    clock.advance(1)
    for _ in range(100):
        limit.refused(sent_at)
    assert limit.calls == 50
    limit.refused(clock.monotonic())
    assert limit.calls == 25


def test_a_call_that_times_out_is_a_sign_of_too_much_unless_others_are_answered_without_a_queue() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=20)
    clock.advance(1)
    limit.timed_out(0.0)
    assert limit.calls == 10
    clock.advance(0.5)
    limit.answered(1.2, 1, 0.01)
    clock.advance(0.5)
    limit.timed_out(1.0)
    assert limit.calls == 10
    clock.advance(1)
    limit.timed_out(2.0)
    assert limit.calls == 5


def test_it_stays_between_floor_and_ceiling() -> None:
    clock = FakeClock()
    limit = a_limit(clock, initial=10, floor=3, ceiling=12)
    for _ in range(100):
        limit.answered(clock.monotonic(), limit.calls, 0.0)
    assert limit.calls == 12
    for _ in range(10):
        limit.refused(clock.monotonic())
    assert limit.calls == 3


def test_a_limit_that_is_not_used_is_not_raised() -> None:
    limit = a_limit(FakeClock(), initial=20)
    for _ in range(100):
        limit.answered(0.0, 9, 0.0)
    assert limit.calls == 20


def test_latency_above_the_least_one_seen_is_queue() -> None:
    clock = FakeClock()
    limit = a_limit(clock)
    assert limit.delay_s(0.2) == 0.0
    assert limit.delay_s(0.05) == 0.0
    assert limit.delay_s(0.25) == pytest.approx(0.2)
    clock.advance(60)
    assert limit.delay_s(0.25) == pytest.approx(0.197)  # A minute's queue is not the new normal,
    for _ in range(100):
        clock.advance(60)
        limit.delay_s(0.25)
    assert limit.delay_s(0.25) == pytest.approx(0.0, abs=0.02)  # an hour's is.


class Server:
    """Answers `per_s` calls a second, one after the other; a call that would queue for too long is refused."""

    def __init__(self, clock: VirtualClock, per_s: float, refuses_from_s: float = 1e9) -> None:
        self.clock, self.per_s, self.refuses_from_s = clock, per_s, refuses_from_s
        self.free_at = 0.0
        self.answered = 0

    async def call(self, permit: Permit, tells: bool) -> None:
        now = self.clock.monotonic()
        queue_s = max(0.0, self.free_at - now)
        if queue_s > self.refuses_from_s:
            await self.clock.sleep(0.005)
            permit.refused()
            return
        self.free_at = max(now, self.free_at) + 1 / self.per_s
        await self.clock.sleep(self.free_at - now + 0.005)
        self.answered += 1
        permit.answered(queue_s if tells else None)


async def offer(throttle: Throttle, server: Server, per_s: float, seconds: float, tells: bool) -> int:
    """Open-loop arrivals, each with 2 s of patience; how many were turned away here."""
    dice = random.Random(7)
    turned_away = 0

    async def one() -> None:
        nonlocal turned_away
        try:
            permit = await throttle.acquire(INTERACTIVE, within_s=2.0)
        except Overloaded:
            turned_away += 1
            return
        await server.call(permit, tells)

    ends_at = server.clock.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        while server.clock.monotonic() < ends_at:
            group.create_task(one())
            await server.clock.sleep(dice.expovariate(per_s))
    return turned_away


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("times", [3, 10])
def test_at_a_multiple_of_the_load_the_server_stays_busy_with_a_short_queue(times: int, tells: bool) -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle, server = Throttle(ThrottleSettings(), clock), Server(clock, per_s=100)
        await offer(throttle, server, 100 * times, 2, tells)
        before = server.answered
        await offer(throttle, server, 100 * times, 3, tells)
        assert server.answered - before >= 0.95 * 100 * 3
        assert server.free_at - clock.monotonic() < 0.3
        assert throttle.in_flight == throttle.waiting == 0

    run(scenario())


def test_it_recovers_when_the_server_does() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle, server = Throttle(ThrottleSettings(), clock), Server(clock, per_s=200, refuses_from_s=0.5)
        await offer(throttle, server, 400, 1, tells=True)
        server.per_s = 10
        await offer(throttle, server, 400, 5, tells=True)
        assert throttle.limit.calls <= 10
        server.per_s = 200
        await offer(throttle, server, 400, 1, tells=True)
        before = server.answered
        await offer(throttle, server, 400, 2, tells=True)
        assert server.answered - before >= 0.95 * 200 * 2

    run(scenario())


def test_the_most_urgent_goes_first_and_equals_in_their_order() -> None:
    async def scenario() -> list[str]:
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), VirtualClock())
        held = await throttle.acquire(BULK, 10)
        order: list[str] = []

        async def one(name: str, urgency: int) -> None:
            permit = await throttle.acquire(urgency, 10)
            order.append(name)
            permit.release()

        async with asyncio.TaskGroup() as group:
            for name, urgency in (
                ("bulk", BULK),
                ("partner", PARTNER),
                ("first", INTERACTIVE),
                ("second", INTERACTIVE),
            ):
                group.create_task(one(name, urgency))
            await asyncio.sleep(0)  # noqa: TID251  Lets them queue up.
            held.release()
        return order

    assert run(scenario()) == ["first", "second", "partner", "bulk"]


def test_who_cannot_get_a_turn_in_time_is_told_at_once_how_long_it_would_take() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), clock)
        first = await throttle.acquire(INTERACTIVE, 10)
        await clock.sleep(3)
        first.answered(0.0)
        await throttle.acquire(INTERACTIVE, 10)
        started = clock.monotonic()
        with pytest.raises(Overloaded, match=r"about 3\.0 s") as told:
            await throttle.acquire(INTERACTIVE, 2.0)
        assert told.value.retry_s == pytest.approx(3.0)
        assert clock.monotonic() == started

    run(scenario())


def test_who_waited_in_vain_is_told_when_the_time_is_over() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), clock)
        await throttle.acquire(INTERACTIVE, 10)
        with pytest.raises(Overloaded, match=r"no turn within 2\.0 s"):
            await throttle.acquire(INTERACTIVE, 2.0)
        assert clock.monotonic() == pytest.approx(2.0)
        assert throttle.waiting == 0

    run(scenario())


def test_a_full_queue_turns_away_the_newest_of_the_least_urgent() -> None:
    async def scenario() -> list[str]:
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1, waiting_max=2), VirtualClock())
        held = await throttle.acquire(INTERACTIVE, 10)
        ends: list[str] = []

        async def one(name: str, urgency: int) -> None:
            try:
                (await throttle.acquire(urgency, 10)).release()
                ends.append(f"{name} went")
            except Overloaded:
                ends.append(f"{name} turned away")

        async with asyncio.TaskGroup() as group:
            for name, urgency in (("b1", BULK), ("b2", BULK), ("i1", INTERACTIVE), ("b3", BULK)):
                group.create_task(one(name, urgency))
                await asyncio.sleep(0)  # noqa: TID251  One after the other.
            held.release()
        return ends

    assert run(scenario()) == ["b2 turned away", "b3 turned away", "i1 went", "b1 went"]


def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), VirtualClock())
        held = await throttle.acquire(INTERACTIVE, 10)
        waiting = asyncio.create_task(throttle.acquire(INTERACTIVE, 10))
        await asyncio.sleep(0)  # noqa: TID251  Lets it queue up.
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert throttle.waiting == 0
        granted = asyncio.create_task(throttle.acquire(INTERACTIVE, 10))
        await asyncio.sleep(0)  # noqa: TID251  Lets it queue up.
        held.release()  # Its turn comes,
        granted.cancel()  # and in the same moment it is cancelled.
        await asyncio.gather(granted, return_exceptions=True)
        assert throttle.in_flight == 0

    run(scenario())


def test_who_just_gave_up_is_not_turned_away_once_more() -> None:
    async def scenario() -> None:
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1, waiting_max=1), VirtualClock())
        await throttle.acquire(INTERACTIVE, 10)
        waiting = asyncio.create_task(throttle.acquire(BULK, 10))
        await asyncio.sleep(0)  # noqa: TID251  Lets it queue up.
        waiting.cancel()  # Its task has not run yet.
        with pytest.raises(Overloaded, match="no turn"):
            await throttle.acquire(INTERACTIVE, 0.5)
        await asyncio.gather(waiting, return_exceptions=True)
        assert throttle.waiting == 0

    run(scenario())


def test_calls_that_give_up_leave_no_work_to_the_garbage_collector() -> None:
    async def scenario() -> None:
        throttle = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), VirtualClock())
        await throttle.acquire(INTERACTIVE, 10)

        async def one() -> None:
            with contextlib.suppress(Overloaded):
                await throttle.acquire(INTERACTIVE, 0.5)

        await asyncio.gather(*(one() for _ in range(10)))
        gc.collect()
        gc.disable()
        try:
            await asyncio.gather(*(one() for _ in range(100)))
            assert gc.collect() < 100
        finally:
            gc.enable()

    run(scenario())


def test_a_permit_ends_once() -> None:
    async def scenario() -> None:
        throttle = Throttle(ThrottleSettings(initial=20), VirtualClock())
        permit = await throttle.acquire(INTERACTIVE, 1)
        permit.release()
        permit.answered()
        permit.refused()
        assert throttle.in_flight == 0
        assert throttle.limit.calls == 20

    run(scenario())


async def test_the_last_place_is_kept_for_who_waits_in_front_of_a_screen() -> None:
    throttle = Throttle(ThrottleSettings(initial=2, ceiling=2), FakeClock())
    first = await throttle.acquire(BULK, 1.0)
    second = asyncio.ensure_future(throttle.acquire(BULK, 1.0))
    await asyncio.wait([second], timeout=0.001)
    assert not second.done(), "there is a place, and it is not for bulk"
    urgent = await throttle.acquire(INTERACTIVE, 1.0)
    first.release()
    await asyncio.wait([second], timeout=0.001)
    assert not second.done()
    urgent.release()
    (await second).release()
    alone = Throttle(ThrottleSettings(initial=1, floor=1, ceiling=1), FakeClock())
    (await alone.acquire(BULK, 1.0)).release()


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


@pytest.mark.parametrize("urgency", [INTERACTIVE, PARTNER, BULK])
@pytest.mark.parametrize("floor", [1, 2])
def test_a_limit_grows_again_after_an_overload_whoever_calls(urgency: int, floor: int) -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(initial=2, floor=floor, ceiling=16), clock)
        for _ in range(3):
            await clock.sleep(1)
            (await throttle.acquire(urgency, 10)).timed_out()
        for _ in range(60):
            held = []
            while throttle._has_room(urgency):
                held.append(await throttle.acquire(urgency, 10))
            await clock.sleep(0.01)
            for permit in held:
                permit.answered(0.0)
        assert throttle.limit.calls == 16

    run(scenario())


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


def test_each_class_is_woken_when_its_own_gate_opens() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(), clock)
        for _ in range(6):
            permit = await throttle.acquire(BULK, 10)
            permit.refused(0.2)
            await clock.sleep(0.001)
        for _ in range(2):
            (await throttle.acquire(INTERACTIVE, 10)).refused(0.2)
            await clock.sleep(0.001)
        assert throttle.gates.shut_s(BULK) > 1.0
        started = clock.monotonic()
        bulk = asyncio.ensure_future(throttle.acquire(BULK, 10))
        (await throttle.acquire(INTERACTIVE, 1.0)).answered(0.0)
        assert clock.monotonic() - started < 0.25
        (await bulk).release()

    run(scenario())


def test_reads_go_on_while_a_class_of_submits_stays_away() -> None:
    async def scenario() -> None:
        throttle = Throttle(ThrottleSettings(), VirtualClock(), gated=False)
        for _ in range(5):
            (await throttle.acquire(INTERACTIVE, 1.0)).refused(60.0)

    run(scenario())


async def test_a_loop_that_wakes_a_little_early_wakes_again() -> None:
    clock = SystemClock()
    throttle = Throttle(ThrottleSettings(), clock)
    for _ in range(2):
        (await throttle.acquire(BULK, 1)).refused(0.05)
        await clock.sleep(0.001)
    waiting = asyncio.ensure_future(throttle.acquire(BULK, 5))
    await clock.sleep(0)
    throttle._wake()  # As a timer that comes too early does.
    (await asyncio.wait_for(waiting, 1.0)).release()


def test_a_shut_gate_opens_by_itself_and_who_cannot_wait_for_it_is_told_at_once() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(), clock)
        for _ in range(2):
            await clock.sleep(0.1)
            (await throttle.acquire(BULK, 10)).refused(1.0)
        with pytest.raises(Overloaded, match=r"about 1\.0 s"):
            await throttle.acquire(BULK, 0.5)
        (await throttle.acquire(INTERACTIVE, 0.5)).release()
        started = clock.monotonic()
        first, second = (asyncio.ensure_future(throttle.acquire(BULK, 10)) for _ in range(2))
        permit = await first
        assert clock.monotonic() == pytest.approx(started + 1.0, abs=0.01)
        assert not second.done(), "one call knocks"
        permit.answered(0.0)
        (await second).release()

    run(scenario())


def test_no_turn_is_given_to_who_would_not_be_there_for_the_answer() -> None:
    async def scenario() -> None:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(initial=2, floor=2, ceiling=2), clock)
        first, other = [await throttle.acquire(INTERACTIVE, 10) for _ in range(2)]
        hasty, patient = (asyncio.ensure_future(throttle.acquire(INTERACTIVE, s)) for s in (1.5, 5.0))
        await clock.sleep(1.0)
        first.answered(0.0)  # Half a second is left to the first in line, and answers take one.
        with pytest.raises(Overloaded, match=r"too late: answers take 1\.0 s"):
            await hasty
        held = await patient
        with pytest.raises(Overloaded):
            await throttle.acquire(INTERACTIVE, 1.4)  # Its turn would come in half a second.
        other.release()
        held.release()
        (await throttle.acquire(INTERACTIVE, 0.1)).release()  # Nobody is before it: how long it takes is to be seen.

    run(scenario())


class Crowd:
    """Many who wait behind one that is in flight."""

    def __init__(self, *, company: bool = True) -> None:
        self.clock = VirtualClock()
        settings = ThrottleSettings(initial=1, floor=1, ceiling=4)
        self.throttle = Throttle(settings, self.clock, company=lambda: company)

    async def begin(self, waiting: int, urgency: int = INTERACTIVE) -> tuple[Permit, list[asyncio.Task[Permit]]]:
        first = await self.throttle.acquire(urgency, 600)
        waiters = [asyncio.create_task(self.throttle.acquire(urgency, 600)) for _ in range(waiting)]
        await self.clock.sleep(1.0)
        return first, waiters


def test_those_who_wait_get_a_place_together_and_it_is_free_when_the_last_of_them_is_done() -> None:
    async def scenario() -> None:
        crowd, most = Crowd(), COMPANY.ceiling
        first, waiters = await crowd.begin(most + 1)
        assert first.company == 1
        first.release()
        together = await asyncio.gather(*waiters[:most])
        assert [permit.company for permit in together] == [most] * most
        for permit in together[1:]:
            permit.release()
        await crowd.clock.sleep(0)
        assert (crowd.throttle.in_flight, crowd.throttle.waiting) == (1, 1)
        together[0].release()
        assert (await waiters[most]).company == 1

    run(scenario())


def test_those_who_go_together_count_as_one_answer() -> None:
    async def scenario() -> None:
        crowd = Crowd()
        first, waiters = await crowd.begin(4)
        first.answered(0.0)
        before = crowd.throttle.limit.calls
        for permit in await asyncio.gather(*waiters):
            permit.answered(0.0)
        assert (before, crowd.throttle.limit.calls) == (2, 3)

    run(scenario())


def test_the_longer_the_queue_the_fewer_go_together_and_more_again_when_it_is_gone() -> None:
    async def scenario() -> list[int]:
        crowd, found = Crowd(), []
        first, waiters = await crowd.begin(400)
        waiting = iter(waiters)
        first.release()
        for queue_s in [0.2, 1.0, 1.0, 1.0, 1.0, 1.0, *[0.0] * 30]:
            lead = await next(waiting)
            found.append(lead.company)
            others = [await next(waiting) for _ in range(lead.company - 1)]
            await crowd.clock.sleep(0.01)
            for permit in (lead, *others):
                permit.answered(queue_s)
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        return found

    found = run(scenario())
    assert found[:7] == [16, 16, 8, 4, 2, 1, 1]
    assert found[-1] >= 8


def test_the_wait_to_be_expected_is_shorter_where_several_go_together() -> None:
    async def scenario() -> list[float]:
        found = []
        for company in (False, True):
            crowd = Crowd(company=company)
            first, waiters = await crowd.begin(3)
            first.answered(0.5)  # It took a second; half of it was a queue, so that the limit stays.
            await crowd.clock.sleep(0)
            found.append(crowd.throttle.expected_wait_s(INTERACTIVE))
            for waiter in waiters:
                waiter.cancel()
            await asyncio.gather(*waiters, return_exceptions=True)
        return found

    # Two wait yet, each for a second; all three went, and the next one may at once when they are back.
    assert run(scenario()) == [pytest.approx(3.0), pytest.approx(1.0)]


def test_one_refusal_of_one_replica_changes_nothing() -> None:
    async def scenario() -> list[int]:
        crowd = Crowd()
        first, waiters = await crowd.begin(3, PARTNER)
        first.refused(0.05)
        return [permit.company for permit in await asyncio.gather(*waiters)]

    assert run(scenario()) == [3, 3, 3]


@pytest.mark.parametrize("urgency", [PARTNER, BULK])
def test_a_class_that_had_to_stay_away_knocks_alone_and_comes_one_by_one_for_a_while(urgency: int) -> None:
    async def scenario() -> tuple[list[int], int]:
        crowd = Crowd()
        throttle, clock = crowd.throttle, crowd.clock
        found = []
        for _ in range(8):  # Until it stays away for as long as it may.
            (await throttle.acquire(PARTNER, 600)).refused(2.0)
            await clock.sleep(0.01)
        waiters = [asyncio.create_task(throttle.acquire(urgency, 600)) for _ in range(6)]
        await clock.sleep(SHUT_S_MAX + 0.1)
        knocks = [await waiters[0]]
        found.append(knocks[0].company)
        knocking = sum(waiter.done() for waiter in waiters)
        knocks[0].answered(0.0)
        second = await waiters[1]
        found.append(second.company)
        for waiter in waiters[2:]:
            if waiter.done():
                found.append(waiter.result().company)
                waiter.result().release()
        await clock.sleep(WELCOME_S)
        late = [asyncio.create_task(throttle.acquire(urgency, 600)) for _ in range(6)]
        await clock.sleep(0)
        second.release()
        left = [waiter for waiter in [*waiters[2:], *late] if not waiter.done()]
        await clock.sleep(0)
        found.append(max((waiter.result().company for waiter in left if waiter.done()), default=0))
        for waiter in [*waiters, *late]:
            waiter.cancel()
        return found, knocking

    found, knocking = run(scenario())
    assert knocking == 1
    assert set(found[:-1]) == {1}
    assert found[-1] > 1


def test_a_knock_goes_on_though_one_of_those_who_knock_leaves() -> None:
    async def scenario() -> list[float]:
        crowd = Crowd()
        throttle = crowd.throttle
        first, waiters = await crowd.begin(3, BULK)
        first.release()
        one, *others = await asyncio.gather(*waiters)
        throttle.gates.sent(BULK)
        for sent_at in (crowd.clock.monotonic(), crowd.clock.monotonic() + 0.01):
            throttle.gates.refused(BULK, sent_at, 0.05)
        await crowd.clock.sleep(0.2)
        throttle.gates.sent(BULK)
        found = [throttle.gates.opens_s(BULK)]
        one.release()
        found.append(throttle.gates.opens_s(BULK))
        for other in others:
            other.release()
        return [*found, throttle.gates.opens_s(BULK)]

    assert run(scenario()) == [KNOCK_S, KNOCK_S, 0.0]


def test_many_places_are_not_sixteen_times_as_many_calls() -> None:
    async def scenario() -> list[int]:
        clock = VirtualClock()
        throttle = Throttle(ThrottleSettings(initial=40, ceiling=40), clock, company=lambda: True)
        held = [await throttle.acquire(INTERACTIVE, 60) for _ in range(40)]
        waiters = [asyncio.create_task(throttle.acquire(INTERACTIVE, 60)) for _ in range(200)]
        await clock.sleep(0)
        for permit in held:
            permit.answered(0.0)
        await clock.sleep(0)
        found = [sum(waiter.done() for waiter in waiters), throttle.in_flight]
        for waiter in waiters:
            waiter.cancel()
        return found

    assert run(scenario()) == [40, 40]
