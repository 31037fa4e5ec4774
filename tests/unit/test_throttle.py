"""The throttle: the most urgent first, and never anyone who waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random

import pytest

from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.errors import Overloaded
from loanmesh.runtime.throttle import Permit, Throttle, ThrottleSettings
from tests.virtual import VirtualClock, run

INTERACTIVE, PARTNER, BULK = 0, 1, 2


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
