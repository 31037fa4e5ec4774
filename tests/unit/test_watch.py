"""Who waits is told: each by a bell of his own, whatever happens to the poll, and when the replica leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from services.intake.watch import Watch


class Revisions:
    """What the store says; fails as often as it is told to."""

    def __init__(self, fails: int = 0) -> None:
        self.newest: dict[str, int] = {}
        self.fails = fails

    async def __call__(self, ids: Sequence[str]) -> dict[str, int]:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no such table")
        return {key: self.newest[key] for key in ids if key in self.newest}


async def test_two_watchers_of_one_application_hear_of_the_same_change() -> None:
    watch = Watch(Revisions(), FakeClock(), 1.0)
    with watch("a") as one, watch("a") as other:
        watch.changed(["a"])
        assert await one.next_change() is None
        assert await other.next_change() is None


async def test_a_poll_that_fails_is_followed_by_one_that_does_not() -> None:
    revisions = Revisions(fails=3)
    told: list[str] = []
    watch = Watch(revisions, FakeClock(), 1.0, lambda event, **_: told.append(event))
    watch.start()
    with watch("a") as watching:
        revisions.newest["a"] = 2
        async with asyncio.timeout(5):
            await watching.next_change()
    await watch.stop()
    assert told == ["watch_failed"] * 3


async def test_who_waits_is_sent_elsewhere_when_the_replica_leaves() -> None:
    watch = Watch(Revisions(), FakeClock(), 1.0)
    with watch("a") as watching:
        waiting = asyncio.create_task(watching.next_change())
        await FakeClock().sleep(0)
        watch.leave()
        with pytest.raises(DependencyDown, match="leaving"):
            await waiting
