"""The worker: batches that fill up, and inherit nothing from who started them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from loanmesh.runtime import deadline
from loanmesh.runtime.clock import FakeClock
from services.intake.application import Claim
from services.intake.worker import Worker


class Leases:
    """Hands out nothing; remembers what was given back."""

    def __init__(self) -> None:
        self.released: list[str] = []

    async def claim(self, at_most: int) -> list[Claim]:
        return []

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        return {claim.id for claim in claims}

    async def release(self, claims: Sequence[Claim]) -> None:
        self.released += [claim.id for claim in claims]

    async def expire_overdue(self) -> int:
        return 0


def a_claim(number: int) -> Claim:
    return Claim(str(number), "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 0.0)


def a_worker(leases: Leases, decide_batch) -> Worker:  # type: ignore[no-untyped-def]
    return Worker(leases, decide_batch, FakeClock(), batch_max=4, batches=1, held_max=10, lease_s=9, poll_s=1,
                  settled=lambda ids: None, report=lambda *_, **__: None)  # fmt: skip


async def test_a_batch_does_not_inherit_the_deadline_of_the_caller_that_started_it() -> None:
    left: list[float] = []

    async def decide_batch(claims: Sequence[Claim]) -> set[str]:
        left.append(deadline.remaining_s(100.0, 2.0))
        return {claim.id for claim in claims}

    worker = a_worker(Leases(), decide_batch)
    deadline.note(1.0)  # A caller whose time is long over.
    for number in range(6):
        worker.offer(a_claim(number))
    await worker.drain()
    deadline.note(None)
    assert left
    assert set(left) == {2.0}


async def test_draining_finishes_what_is_begun_and_gives_back_the_rest() -> None:
    gate = asyncio.Event()
    begun: list[str] = []

    async def decide_batch(claims: Sequence[Claim]) -> set[str]:
        begun.extend(claim.id for claim in claims)
        await gate.wait()
        return {claim.id for claim in claims}

    leases = Leases()
    worker = a_worker(leases, decide_batch)
    for number in range(9):
        worker.offer(a_claim(number))
    while not begun:
        await FakeClock().sleep(0)
    gate.set()
    await worker.drain()
    assert not worker.has_room
    assert sorted(begun + leases.released) == [str(number) for number in range(9)]
