"""The worker: batches that fill up, urgent work first, nothing starved, nothing inherited, nothing dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from loanmesh.runtime import deadline
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from services.intake.application import Claim
from services.intake.held import Held
from services.intake.ports import Deferred, Result
from services.intake.worker import GATHER_S, Worker

INTERACTIVE, PARTNER, BULK = 1, 2, 3
Decide = Callable[[Sequence[Claim]], Awaitable[Mapping[str, Result]]]


class Leases:
    """Hands out what stands in `open`; remembers what was given back."""

    def __init__(self) -> None:
        self.open: list[Claim] = []
        self.released: list[str] = []
        self.renewing = asyncio.Event()
        self.renewed = asyncio.Event()

    async def claim(self, at_most: int) -> list[Claim]:
        taken, self.open = self.open[:at_most], self.open[at_most:]
        return taken

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        self.renewing.set()
        await self.renewed.wait()
        return {claim.id for claim in claims}

    async def release(self, claims: Sequence[Claim]) -> None:
        self.released += [claim.id for claim in claims]

    async def expire_overdue(self) -> int:
        return 0


def a_claim(number: int, priority: int = INTERACTIVE, not_before: float = 0.0) -> Claim:
    return Claim(str(number), "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 0.0, priority, not_before)


def some_claims(count: int, priority: int = INTERACTIVE, first: int = 0) -> list[Claim]:
    return [a_claim(first + number, priority, float(first + number)) for number in range(count)]


def deferred(claims: Sequence[Claim], overloaded: bool = False) -> dict[str, Result]:
    return {claim.id: Deferred(claim, (), 0.0, 0.0, overloaded) for claim in claims}


def a_worker(leases: Leases, decide_batch: Decide, clock: FakeClock | None = None, batches: int = 1) -> Worker:
    return Worker(leases, decide_batch, clock or FakeClock(), batch_max=4, batches=batches, held_max=10, lease_s=9,
                  poll_s=1, settled=lambda results: None, report=lambda *_, **__: None)  # fmt: skip


class StillClock(FakeClock):
    """Sleeps until it is moved on."""

    async def sleep(self, seconds: float) -> None:
        until = self.monotonic() + seconds
        while self.monotonic() < until:  # noqa: ASYNC110  The clock is moved by the test, which has no event for it.
            await asyncio.sleep(0)  # noqa: TID251  Only gives way.


class Deciding:
    """Decides batches that take a while, and notes how large they are and how many are under way at once."""

    def __init__(self, take: Callable[[], Awaitable[None]]) -> None:
        self._take = take
        self._under_way = 0
        self.sizes: list[int] = []
        self.at_once: list[int] = []

    async def __call__(self, claims: Sequence[Claim]) -> dict[str, Result]:
        self._under_way += 1
        self.sizes.append(len(claims))
        self.at_once.append(self._under_way)
        await self._take()
        self._under_way -= 1
        return deferred(claims)


async def turns(count: int = 20) -> None:
    """Let others run."""
    for _ in range(count):
        await FakeClock().sleep(0)


async def test_a_batch_does_not_inherit_the_deadline_of_the_caller_that_started_it() -> None:
    left: list[float] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        left.append(deadline.remaining_s(100.0, 2.0))
        return deferred(claims)

    worker = a_worker(Leases(), decide_batch)
    deadline.note(1.0)  # A caller whose time is long over.
    worker.offer(some_claims(6))
    await worker.drain()
    deadline.note(None)
    assert left
    assert set(left) == {2.0}


async def test_draining_finishes_what_is_begun_and_gives_back_the_rest() -> None:
    gate = asyncio.Event()
    begun: list[str] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.extend(claim.id for claim in claims)
        await gate.wait()
        return deferred(claims)

    leases = Leases()
    worker = a_worker(leases, decide_batch)
    worker.offer(some_claims(9))
    while not begun:
        await turns(1)
    gate.set()
    await worker.drain()
    assert not worker.has_room(INTERACTIVE)
    assert sorted(begun + leases.released) == [str(number) for number in range(9)]


async def test_a_second_batch_starts_when_it_is_full_or_its_first_member_has_waited() -> None:
    gate = asyncio.Event()
    begun: list[int] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.append(len(claims))
        await gate.wait()
        return deferred(claims)

    clock = StillClock()
    worker = a_worker(Leases(), decide_batch, clock, batches=3)
    worker.offer(some_claims(1))
    worker.offer(some_claims(2, first=1))
    await turns()
    assert begun == [1]
    worker.offer(some_claims(2, first=3))
    await turns()
    assert begun == [1], "a full one, and those who answer at the door get their turn first"
    clock.advance(0.021)
    await turns()
    assert begun == [1, 4]
    worker.offer(some_claims(1, first=5))
    await turns()
    assert begun == [1, 4]
    clock.advance(0.03)
    await turns()
    assert begun == [1, 4, 1]
    gate.set()
    await worker.drain()


async def test_after_a_batch_of_several_those_who_come_back_are_gathered_for_the_next() -> None:
    clock, sizes = FakeClock(), []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        sizes.append(len(claims))
        return deferred(claims)

    worker = a_worker(Leases(), decide_batch, clock)
    worker.offer(some_claims(1))
    await turns()
    assert sizes == [1], "who comes alone waits for nothing"
    assert clock.monotonic() == 0.0
    worker.offer(some_claims(2))
    await turns()
    worker.offer(some_claims(2))
    await turns()
    assert sizes == [1, 2, 2], "half of a full one need not wait"
    assert clock.monotonic() == 0.0
    worker.offer(some_claims(1))
    await turns()
    assert sizes == [1, 2, 2, 1]
    assert clock.monotonic() >= GATHER_S


async def test_deciding_rests_while_requests_queue_at_the_door() -> None:
    clock = FakeClock()
    pressed = True
    begun: list[float] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.append(clock.monotonic())
        clock.advance(0.1)
        return deferred(claims)

    worker = Worker(Leases(), decide_batch, clock, batch_max=4, batches=3, held_max=100, lease_s=9, poll_s=1,
                    settled=lambda results: None, report=lambda *_, **__: None, pressed=lambda: pressed)  # fmt: skip
    worker.offer(some_claims(12))
    await turns(200)
    assert begun == [0.0, pytest.approx(0.4, abs=0.03), pytest.approx(0.8, abs=0.06)]
    pressed = False
    worker.offer(some_claims(8, first=20))
    await turns(200)
    assert len(begun) == 5
    assert begun[4] - begun[3] < 0.2
    await worker.drain()


async def test_a_source_that_hangs_does_not_stop_deciding_while_requests_queue() -> None:
    clock = StillClock()
    decide_batch = Deciding(lambda: clock.sleep(1.2))
    worker = Worker(Leases(), decide_batch, clock, batch_max=8, batches=5, held_max=10_000, lease_s=99, poll_s=1,
                    settled=lambda results: None, report=lambda *_, **__: None, pressed=lambda: True)  # fmt: skip
    worker.offer(some_claims(800))
    for _ in range(1000):
        await turns(5)
        clock.advance(0.01)
    assert len(decide_batch.sizes) >= 7, "resting as long as it hung would leave two in ten seconds"
    drained = asyncio.ensure_future(worker.drain())
    while not drained.done():
        await turns(5)
        clock.advance(0.1)


@pytest.mark.parametrize(("batch_s", "side_by_side"), [(0.04, 1), (0.35, 4)])
async def test_while_it_is_crowded_batches_follow_one_another_unless_they_only_wait(
    batch_s: float, side_by_side: int
) -> None:
    clock = StillClock()
    pressed = False
    decide_batch = Deciding(lambda: clock.sleep(batch_s))
    sizes, at_once = decide_batch.sizes, decide_batch.at_once
    worker = Worker(
        Leases(), decide_batch, clock, batch_max=8, batches=5, held_max=10_000, lease_s=9, poll_s=1,
        settled=lambda results: None, report=lambda *_, **__: None, crowded=lambda: True, pressed=lambda: pressed,
    )  # fmt: skip
    worker.offer(some_claims(160))
    for _ in range(1500):
        await turns(5)
        clock.advance(0.01)
    assert set(sizes) == {8}, "a backlog is worked off in full ones when the callers are gone"
    assert max(at_once) == side_by_side
    sizes.clear()
    pressed = True
    worker.offer(some_claims(4, first=1000))
    for _ in range(500):
        await turns(5)
        clock.advance(0.01)
    assert sizes == [2, 2], "a quarter of a full one while calls queue"
    await worker.drain()


async def test_what_was_narrowed_widens_again_by_itself() -> None:
    clock = StillClock()
    crowded = True
    decide_batch = Deciding(lambda: clock.sleep(0.2))
    at_once = decide_batch.at_once
    worker = Worker(Leases(), decide_batch, clock, batch_max=8, batches=3, held_max=10_000, lease_s=9, poll_s=1,
                    settled=lambda results: None, report=lambda *_, **__: None, crowded=lambda: crowded)  # fmt: skip
    worker.offer(some_claims(2000))
    await turns(5)
    crowded = False
    for _ in range(400):
        await turns(5)
        clock.advance(0.01)
    assert at_once[:2] == [1, 1]
    assert set(at_once[-10:]) == {3}
    drained = asyncio.ensure_future(worker.drain())
    while not drained.done():
        await turns(5)
        clock.advance(0.1)


async def test_what_comes_while_leases_are_renewed_is_kept() -> None:
    gate = asyncio.Event()
    begun: list[str] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.extend(claim.id for claim in claims)
        await gate.wait()
        return deferred(claims)

    leases = Leases()
    worker = a_worker(leases, decide_batch)
    worker.start()
    worker.offer(some_claims(1))
    await leases.renewing.wait()
    worker.offer(some_claims(1, first=1))
    leases.renewed.set()
    await turns()
    gate.set()
    await turns()
    await worker.drain()
    assert begun == ["0", "1"]


async def test_what_the_store_could_not_commit_is_done_again_as_soon_as_it_may_be_back() -> None:
    clock = FakeClock()
    down = True
    begun: list[float] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.append(clock.monotonic())
        if down:
            raise DependencyDown("the database cannot be written")
        return deferred(claims)

    worker = a_worker(Leases(), decide_batch, clock)
    worker.offer(some_claims(3))
    await turns(200)
    down = False
    await turns(200)
    assert 2 <= len(begun) < 50
    assert begun[1] - begun[0] >= 1.0  # Not before the store is looked at again.
    assert not worker.busy
    await worker.drain()


async def test_nothing_is_begun_or_claimed_for_a_service_that_is_down_and_one_batch_tries_it() -> None:
    allowed: int | None = 0
    begun: list[int] = []
    gate = asyncio.Event()

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.append(len(claims))
        await gate.wait()
        return deferred(claims)

    leases = Leases()
    leases.open = some_claims(4, first=50)
    worker = Worker(leases, decide_batch, FakeClock(), batch_max=4, batches=8, held_max=100, lease_s=9, poll_s=1,
                    settled=lambda results: None, report=lambda *_, **__: None, may_begin=lambda: allowed)  # fmt: skip
    worker.start()
    worker.offer(some_claims(12))
    await turns(100)
    assert (begun, len(leases.open)) == ([], 4)
    allowed = 1
    await turns(100)
    assert begun == [4]
    allowed = None
    await turns(100)
    assert begun == [4, 4, 4, 4]
    gate.set()
    await worker.drain()


async def test_batches_that_take_too_long_are_fewer_side_by_side() -> None:
    clock = FakeClock()

    async def two_seconds() -> None:
        await turns(50)
        clock.advance(2.0)

    decide_batch = Deciding(two_seconds)
    at_once = decide_batch.at_once
    worker = Worker(Leases(), decide_batch, clock, batch_max=4, batches=8, held_max=1000, lease_s=9, poll_s=1,
                    settled=lambda results: None, report=lambda *_, **__: None)  # fmt: skip
    worker.offer(some_claims(160))
    await turns(2000)
    assert max(at_once) == 8
    assert set(at_once[-10:]) == {1}
    await worker.drain()


def test_low_classes_get_their_share_of_small_batches_too() -> None:
    held = Held()
    held.add([a_claim(n, BULK, float(n)) for n in range(20)], 0.0)
    taken: list[int] = []
    for turn in range(100):
        held.add(some_claims(2, INTERACTIVE, 1000 + 2 * turn), 0.0)
        taken += [claim.priority for claim in held.take(2)]
    assert taken.count(BULK) == 20


def test_of_two_leases_on_one_application_the_newer_is_held() -> None:
    held = Held()
    older, newer = a_claim(1), replace(a_claim(1), fence=2)
    for claims in ([older], [newer], [older]):
        held.add([*claims], 0.0)
    assert [claim.fence for claim in held] == [2]
    held.keep({("1", 1)})
    assert len(held) == 0


def test_nothing_leaves_nothing_behind() -> None:
    held = Held()
    for _ in range(1000):
        held.add([], 0.0)
    assert held.came_first_at() == float("inf")


async def test_a_claim_that_fails_in_any_way_does_not_end_the_worker() -> None:
    begun: list[str] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.extend(claim.id for claim in claims)
        return deferred(claims)

    class Failing(Leases):
        """Fails once, as no database should."""

        failed = False

        async def claim(self, at_most: int) -> list[Claim]:
            if not self.failed:
                self.failed = True
                raise RuntimeError("deadlock detected")
            return await super().claim(at_most)

    leases = Failing()
    leases.open = some_claims(3)
    worker = a_worker(leases, decide_batch)
    worker.start()
    await turns()
    assert begun == ["0", "1", "2"]
    await worker.drain()


async def test_a_round_that_fails_for_a_reason_nobody_foresaw_does_not_end_the_worker() -> None:
    asked = 0

    def may_begin() -> int | None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ZeroDivisionError
        return None

    leases = Leases()
    leases.open = some_claims(3)
    worker = a_worker(leases, decide_at_once)
    worker._may_begin = may_begin
    worker.start()
    await turns()
    assert leases.open == []
    await worker.drain()


async def test_low_classes_leave_room_for_urgent_ones_and_nobody_overtakes_his_own_class() -> None:
    gate = asyncio.Event()

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        await gate.wait()
        return deferred(claims)

    leases = Leases()
    worker = a_worker(leases, decide_batch)
    worker.offer(some_claims(5, BULK))
    assert not worker.has_room(BULK)  # Half of ten is full.
    assert worker.has_room(PARTNER)
    assert worker.has_room(INTERACTIVE)
    gate.set()
    await turns()
    assert not worker.has_room(BULK)  # There is room, but older bulk work waits in the store.
    assert worker.has_room(INTERACTIVE)
    worker.start()
    await turns()
    assert worker.has_room(BULK)  # The store was found empty.
    await worker.drain()


async def test_overload_slows_the_worker_down_and_it_recovers_by_itself() -> None:
    clock = FakeClock()
    busy = True
    begun: list[float] = []

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        begun.extend([clock.monotonic()] * len(claims))
        clock.advance(0.01)
        return deferred(claims, overloaded=busy)

    worker = a_worker(Leases(), decide_batch, clock)
    worker.offer(some_claims(8))
    await turns(2000)
    assert len(begun) == 8
    assert begun[-1] > 1.0  # Eight in four at once would have taken a fiftieth of a second.
    busy = False
    worker.offer(some_claims(200, first=100))
    await turns(20_000)
    assert len(begun) == 208
    assert begun[-1] - begun[-50] < 5.0
    await worker.drain()


def test_the_urgent_go_first_and_one_place_in_five_goes_by_age() -> None:
    held = Held()
    held.add([a_claim(n, BULK, 100.0 + n) for n in range(10)], 0.0)
    held.add([a_claim(n, INTERACTIVE, 1000.0 + n) for n in range(100, 120)], 5.0)
    assert held.came_first_at() == 0.0
    assert [claim.id for claim in held.take(10)] == [*(str(n) for n in range(100, 108)), "0", "1"]
    assert len(held) == 20
    assert [claim.id for claim in held.take(4)] == ["108", "109", "110", "111"]
    held.keep({("5", 1), ("119", 1)})
    assert [claim.id for claim in held] == ["119", "5"]
    assert [claim.id for claim in held.take(10)] == ["119", "5"]
    assert held.came_first_at() == float("inf")


async def test_draining_gives_back_what_the_database_is_just_about_to_hand_over() -> None:
    class Slow(Leases):
        """Hands out leases after a while; they are taken all the same."""

        async def claim(self, at_most: int) -> list[Claim]:
            self.claiming.set()
            await self.answered.wait()
            return await super().claim(at_most)

        def __init__(self) -> None:
            super().__init__()
            self.claiming, self.answered = asyncio.Event(), asyncio.Event()

    leases = Slow()
    leases.open = some_claims(3)
    worker = a_worker(leases, decide_at_once)
    worker.start()
    await leases.claiming.wait()
    draining = asyncio.create_task(worker.drain())
    await turns()
    leases.answered.set()
    await draining
    assert leases.released == ["0", "1", "2"]


async def test_what_is_leased_to_a_draining_replica_is_given_back() -> None:
    leases = Leases()
    worker = a_worker(leases, decide_at_once)
    await worker.drain()
    worker.offer(some_claims(2))
    await worker.drain()
    assert leases.released == ["0", "1"]
    assert not worker.busy


async def test_draining_waits_until_a_batch_that_could_not_be_committed_is_given_back() -> None:
    gate = asyncio.Event()

    async def decide_batch(claims: Sequence[Claim]) -> dict[str, Result]:
        await gate.wait()
        raise DependencyDown("no COMMIT")

    class Slow(Leases):
        async def release(self, claims: Sequence[Claim]) -> None:
            await turns(5)
            await super().release(claims)

    leases = Slow()
    worker = a_worker(leases, decide_batch)
    worker.offer(some_claims(2))
    await turns()
    draining = asyncio.create_task(worker.drain())
    await turns()
    gate.set()
    await draining
    assert leases.released == ["0", "1"]


async def decide_at_once(claims: Sequence[Claim]) -> dict[str, Result]:
    return deferred(claims)
