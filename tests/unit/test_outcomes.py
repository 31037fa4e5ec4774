"""Waiting for the decisions of several at once: all in one answer, and nobody's decision held back by another's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from services.intake.application import Claim, New, Snapshot, State
from services.intake.outcomes import STRAGGLE_S, Outcomes, _decided
from services.intake.ports import Awaiting, Decided, Deferred, Result
from services.intake.watch import Watch, WatchingAll
from tests.virtual import VirtualClock, run

CLOCK = VirtualClock()


def a_new(key: str) -> New:
    return New(key, "lenders/demo", "shop", f"request-{key}", b"", "hash", 1, "app", 1.7e9)


def a_claim(key: str) -> Claim:
    return Claim(key, "lenders/demo", 1, 1, 0, 1, "", b"", "[]", 1.7e9)


def a_decision(key: str) -> Decided:
    return Decided(a_claim(key), "APPROVED", "A", key.encode(), b"", b"", b"", 1.7e9, None, {})


class Rows:
    """The store: what it holds now, and how often it was read."""

    def __init__(self) -> None:
        self.states: dict[str, State] = {}
        self.reads: list[list[str]] = []
        self.takes_s = 0.0

    async def get_many(self, ids: Sequence[str]) -> dict[str, Snapshot]:
        if ids:
            self.reads.append(list(ids))
            await CLOCK.sleep(self.takes_s)
        return {
            key: replace(_decided(a_new(key), a_decision(key)), state=self.states.get(key, State.PENDING))
            for key in ids
        }


class Waiting:
    """Several that are waited for, and what comes of them as it is told."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.watch = Watch(cast(Any, None), CLOCK, 1.0)
        self.news = {key: a_new(key) for key in "abc"}
        self.found: dict[str, Snapshot] = {}
        self.took_s = 0.0

    async def wait(self, wait_s: float, happens: Callable[[Waiting], Coroutine[Any, Any, None]]) -> None:
        outcomes = Outcomes(cast(Any, self.rows), self.watch, CLOCK)
        with WatchingAll(self.watch, self.news) as watching:
            story = asyncio.create_task(happens(self))
            began = CLOCK.monotonic()
            self.found = await outcomes.of_all(self.news, watching, wait_s)
            self.took_s = CLOCK.monotonic() - began
            story.cancel()
        assert not self.watch._watchers

    def settled(self, results: Mapping[str, Result]) -> None:
        self.watch.settled(results)


def after(happens: Callable[[Waiting], Coroutine[Any, Any, None]], wait_s: float = 5.0) -> Waiting:
    waiting = Waiting()
    run(waiting.wait(wait_s, happens))
    return waiting


def test_all_that_are_decided_here_are_answered_without_reading() -> None:
    async def happens(waiting: Waiting) -> None:
        await CLOCK.sleep(0.5)
        waiting.settled({key: a_decision(key) for key in "ab"})
        await CLOCK.sleep(STRAGGLE_S / 2)
        waiting.settled({"c": a_decision("c")})

    waiting = after(happens)
    assert waiting.took_s == pytest.approx(0.5 + STRAGGLE_S / 2)
    assert {key: one.decision for key, one in waiting.found.items()} == {"a": b"a", "b": b"b", "c": b"c"}
    assert waiting.rows.reads == []


def test_one_that_takes_longer_holds_back_nobody() -> None:
    async def happens(waiting: Waiting) -> None:
        await CLOCK.sleep(0.5)
        waiting.settled({"b": a_decision("b"), "c": Deferred(a_claim("c"), ("source_missing:tax",), 1.0, 1.7e9)})

    waiting = after(happens)
    assert list(waiting.found) == ["b"]
    assert waiting.took_s == pytest.approx(0.5 + STRAGGLE_S)
    assert waiting.rows.reads == []


def test_what_changed_elsewhere_is_read_and_waited_for_while_it_is_pending() -> None:
    async def happens(waiting: Waiting) -> None:
        waiting.watch.changed("ab")
        await CLOCK.sleep(1.0)
        waiting.rows.states = {"a": State.WITHDRAWN, "b": State.AWAITING_INFORMATION, "c": State.DECIDED}
        waiting.watch.changed("a")
        waiting.settled({"b": Awaiting(a_claim("b"), (), 1.7e9, 1.8e9)})
        await CLOCK.sleep(0.01)
        waiting.watch.changed("c")

    waiting = after(happens)
    assert {key: one.state for key, one in waiting.found.items()} == waiting.rows.states
    assert waiting.rows.reads == [["a", "b"], ["a", "b"], ["c"]]


def test_what_could_not_be_read_in_time_is_read_by_who_waits_on() -> None:
    async def scenario() -> None:
        waiting = Waiting()
        outcomes = Outcomes(cast(Any, waiting.rows), waiting.watch, CLOCK)
        waiting.rows.states = {"b": State.WITHDRAWN}
        waiting.rows.takes_s = 0.3
        with WatchingAll(waiting.watch, waiting.news) as watching:
            waiting.settled({"a": a_decision("a")})
            waiting.watch.changed("b")
            found = await outcomes.of_all(waiting.news, watching, 0.2)
            assert list(found) == ["a"]
            waiting.rows.takes_s = 0.0
            assert list(await outcomes.of_all(waiting.news, watching, 0.2)) == ["b"]

    run(scenario())


def test_the_wait_ends_without_any_and_when_the_replica_leaves() -> None:
    async def nothing(_: Waiting) -> None: ...

    async def leaves(waiting: Waiting) -> None:
        await CLOCK.sleep(0.2)
        waiting.watch.leave()

    waiting = after(nothing, wait_s=2.0)
    assert not waiting.found
    assert waiting.took_s == pytest.approx(2.0)
    waiting = after(leaves)
    assert not waiting.found
    assert waiting.took_s == pytest.approx(0.2)
