"""A guard: bounded room, bounded waiting, the breaker's leave asked for last, and overload that is no fault."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from loanmesh.runtime.breaker import BreakerSettings, State
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.guard import BulkheadSettings, Guard, Refused, Verdict, make_guard

T = TypeVar("T")


def a_guard(clock: FakeClock, at_once_max: int = 2, waiting_max: int = 3, permits: int = 1) -> Guard:
    breaker = BreakerSettings(window=4, minimum_calls=2, open_s=10, open_s_max=10, jitter=0, half_open_permits=permits)
    bulkhead = BulkheadSettings(at_once_max=at_once_max, waiting_max=waiting_max)
    return make_guard("court", "source", breaker, bulkhead, clock, random.Random(1))


def answering(verdict: Verdict) -> tuple[Callable[[], Awaitable[Verdict]], Callable[[Verdict], Verdict]]:
    async def ask() -> Verdict:
        return verdict

    return ask, lambda said: said


async def times(guard: Guard, count: int, verdict: Verdict) -> list[str]:
    """Calls one after the other; what became of each."""
    ends = []
    for _ in range(count):
        try:
            async with asyncio.timeout(5):
                ends.append((await guard.call(*answering(verdict))).value)
        except Refused as refused:
            ends.append(refused.cause)
    return ends


class Held:
    """A dependency that answers when it is let."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.let = asyncio.Event()
        self.asked = 0

    async def ask(self) -> Verdict:
        self.asked += 1
        await self.let.wait()
        return Verdict.WELL

    def call(self) -> asyncio.Task[Verdict]:
        return asyncio.create_task(self.guard.call(self.ask, lambda said: said))


async def soon(*calls: Awaitable[T]) -> list[T]:
    """What the calls end with; a guard that forgets a waiter fails here instead of hanging."""
    async with asyncio.timeout(5):
        return list(await asyncio.gather(*calls))


async def settle(clock: FakeClock) -> None:
    for _ in range(20):
        await clock.sleep(0)


async def test_room_and_waiting_are_bounded_and_the_first_come_is_first_served() -> None:
    clock = FakeClock()
    guard = a_guard(clock)
    held = Held(guard)
    calls = [held.call() for _ in range(7)]
    await settle(clock)
    assert (guard.in_use, guard.waiting, held.asked) == (2, 3, 2)
    refused = [call for call in calls if call.done()]
    assert refused == calls[5:]
    assert {str(call.exception()) for call in refused} == {"bulkhead_full; try again in 0 s"}
    held.let.set()
    await soon(*calls[:5])
    assert (guard.in_use, guard.waiting, guard.calls, guard.refusals) == (0, 0, 5, 2)


async def test_the_longest_wait_is_the_queues_delay_and_ends_with_it() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=1)
    held = Held(guard)
    calls = [held.call() for _ in range(2)]
    await settle(clock)
    clock.advance(0.7)
    calls.append(held.call())
    await settle(clock)
    assert guard.wait_s_max == pytest.approx(0.7)
    held.let.set()
    await soon(*calls)
    assert guard.wait_s_max == 0


async def test_an_open_breaker_refuses_at_once_with_the_time_to_come_back() -> None:
    clock = FakeClock()
    guard = a_guard(clock)
    assert await times(guard, 3, Verdict.ILL) == ["ill", "ill", "breaker_open"]
    clock.advance(4)
    with pytest.raises(Refused) as refused:
        await guard.call(*answering(Verdict.WELL))
    assert refused.value.retry_s == 6
    clock.advance(6)
    assert await times(guard, 2, Verdict.WELL) == ["well", "well"]
    assert guard.breaker.state is State.CLOSED


@pytest.mark.parametrize("verdict", [Verdict.BUSY, Verdict.NONE])
async def test_overload_and_our_own_mistakes_open_nothing(verdict: Verdict) -> None:
    guard = a_guard(FakeClock())
    assert await times(guard, 50, verdict) == [verdict.value] * 50
    assert (guard.breaker.state, guard.failures) == (State.CLOSED, 0)
    assert guard.overloads == (50 if verdict is Verdict.BUSY else 0)


async def test_who_waited_while_it_opened_is_refused_and_not_sent() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=1, waiting_max=10)
    asked = 0

    async def dead() -> Verdict:
        nonlocal asked
        asked += 1
        await clock.sleep(0)
        return Verdict.ILL

    calls = [asyncio.create_task(guard.call(dead, lambda said: said)) for _ in range(8)]
    async with asyncio.timeout(5):
        ends = await asyncio.gather(*calls, return_exceptions=True)
    assert asked == 2
    assert [isinstance(end, Refused) for end in ends] == [False, False, *[True] * 6]


async def test_while_a_probe_is_under_way_others_wait_for_its_verdict() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=10, waiting_max=10)
    await times(guard, 2, Verdict.ILL)
    clock.advance(10)
    held = Held(guard)
    calls = [held.call() for _ in range(6)]
    await settle(clock)
    assert (held.asked, guard.waiting) == (1, 5)
    held.let.set()
    assert await soon(*calls) == [Verdict.WELL] * 6


async def test_a_cancelled_probe_lets_the_next_one_probe() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=10, waiting_max=10)
    await times(guard, 2, Verdict.ILL)
    clock.advance(10)
    held = Held(guard)
    probe, other = held.call(), held.call()
    await settle(clock)
    probe.cancel()
    await settle(clock)
    assert held.asked == 2
    held.let.set()
    assert await soon(other) == [Verdict.WELL]
    assert guard.breaker.state is State.CLOSED


async def test_a_cancelled_waiter_leaves_no_trace() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=1)
    held = Held(guard)
    first, second = held.call(), held.call()
    await settle(clock)
    second.cancel()
    await settle(clock)
    assert guard.waiting == 0
    held.let.set()
    await soon(first)
    assert await times(guard, 1, Verdict.WELL) == ["well"]


async def test_a_bug_in_the_call_passes_through_and_is_no_verdict() -> None:
    guard = a_guard(FakeClock())

    async def bug() -> Verdict:
        raise KeyError("a bug")

    for _ in range(10):
        with pytest.raises(KeyError):
            await guard.call(bug, lambda said: said)
    assert (guard.breaker.state, guard.in_use, guard.failures) == (State.CLOSED, 0, 0)


async def test_a_person_who_pauses_it_sends_home_who_waits_for_a_probe() -> None:
    clock = FakeClock()
    guard = a_guard(clock, at_once_max=10)
    await times(guard, 2, Verdict.ILL)
    clock.advance(10)
    held = Held(guard)
    probe, waiter = held.call(), held.call()
    await settle(clock)
    guard.force(State.FORCED_OPEN, "maintenance")
    with pytest.raises(Refused):
        await soon(waiter)
    held.let.set()
    await soon(probe)
    assert guard.breaker.cause == "maintenance"
    guard.force(State.CLOSED, "back")
    assert await times(guard, 1, Verdict.WELL) == ["well"]


async def test_a_guarded_call_is_cheap() -> None:
    """Prints what a guard costs; a figure to look at, no promise: other tests may run beside it."""
    guard = a_guard(FakeClock())
    ask, judge = answering(Verdict.WELL)
    started = time.process_time()
    for _ in range(20_000):
        await guard.call(ask, judge)
    print(f"guard: {(time.process_time() - started) * 50:.2f} us a call")
    assert guard.calls == 20_000
