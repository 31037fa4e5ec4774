"""Those who wait for their turn and go together: how many, when not, and what they count for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from loanmesh.runtime.gates import KNOCK_S, SHUT_S_MAX, WELCOME_S
from loanmesh.runtime.throttle import COMPANY, Permit, Throttle, ThrottleSettings
from tests.virtual import VirtualClock, run

INTERACTIVE, PARTNER, BULK = 0, 1, 2


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


async def sent_away(crowd: Crowd) -> None:
    """Partners are refused until they stay away for as long as a class may, and bulk with them."""
    for _ in range(8):
        (await crowd.throttle.acquire(PARTNER, 600)).refused(2.0)
        await crowd.clock.sleep(0.01)


def companies(waiters: Sequence[asyncio.Task[Permit]]) -> list[int]:
    """Of those that have their turn, how many got each place."""
    return [waiter.result().company for waiter in waiters if waiter.done()]


@pytest.mark.parametrize("urgency", [PARTNER, BULK])
def test_a_class_that_had_to_stay_away_knocks_with_one_call(urgency: int) -> None:
    async def scenario() -> list[int]:
        crowd = Crowd()
        await sent_away(crowd)
        waiters = [asyncio.create_task(crowd.throttle.acquire(urgency, 600)) for _ in range(6)]
        await crowd.clock.sleep(SHUT_S_MAX + 0.1)
        found = companies(waiters)
        for waiter in waiters:
            waiter.cancel()
        return found

    assert run(scenario()) == [1]


@pytest.mark.parametrize(("later_s", "together"), [(0.0, 1), (WELCOME_S - 0.1, 1), (WELCOME_S, 6)])
@pytest.mark.parametrize("urgency", [PARTNER, BULK])
def test_a_class_that_is_let_in_again_comes_one_by_one_for_a_while(urgency: int, later_s: float, together: int) -> None:
    async def scenario() -> list[int]:
        crowd = Crowd()
        await sent_away(crowd)
        (await crowd.throttle.acquire(urgency, 600)).answered(0.0)
        held = await crowd.throttle.acquire(urgency, 600)
        waiters = [asyncio.create_task(crowd.throttle.acquire(urgency, 600)) for _ in range(6)]
        await crowd.clock.sleep(later_s)
        held.release()
        await crowd.clock.sleep(0)
        found = companies(waiters)
        for waiter in waiters:
            waiter.cancel()
        return found

    assert run(scenario()) == [together] * together


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
