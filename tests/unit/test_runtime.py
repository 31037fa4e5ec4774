"""The floor: batches that form by themselves, settings that refuse, deadlines that shrink."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import pytest

from loanmesh.runtime import deadline
from loanmesh.runtime.batching import Batcher
from loanmesh.runtime.clock import FakeClock, new_uuid7
from loanmesh.runtime.errors import InvalidRequest, LoanmeshError, Overloaded
from loanmesh.runtime.knobs import names
from loanmesh.runtime.settings import load
from services.intake.settings import IntakeSettings


async def test_what_arrives_meanwhile_becomes_the_next_batch() -> None:
    sizes: list[int] = []
    clock = FakeClock()
    gate = asyncio.Event()

    async def run(batch: Sequence[int]) -> Sequence[int | LoanmeshError]:
        sizes.append(len(batch))
        await gate.wait()
        return [InvalidRequest(("n", "odd")) if n % 2 else n for n in batch]

    batcher: Batcher[int, int] = Batcher(run, max_items=4, max_waiting=6, clock=clock)
    first = asyncio.create_task(batcher.submit(0))
    while not sizes:
        await asyncio.wait([first], timeout=0.001)
    others = [asyncio.create_task(batcher.submit(n)) for n in range(1, 7)]
    await asyncio.wait(others, timeout=0.001)
    with pytest.raises(Overloaded):
        await batcher.submit(7)
    clock.advance(3.0)
    assert batcher.waited_s == 3.0
    gate.set()
    outcomes = await asyncio.gather(first, *others, return_exceptions=True)
    assert sizes == [1, 4, 2]
    assert batcher.waited_s == 0.0
    assert [isinstance(outcome, InvalidRequest) for outcome in outcomes] == [
        False,
        True,
        False,
        True,
        False,
        True,
        False,
    ]


async def test_a_batch_with_too_few_outcomes_fails_all_of_it_and_leaves_nobody_waiting() -> None:
    async def run(batch: Sequence[int]) -> Sequence[int | LoanmeshError]:
        return list(batch)[1:]

    clock = FakeClock()
    batcher: Batcher[int, int] = Batcher(run, max_items=4, max_waiting=6, clock=clock)
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*(batcher.submit(n) for n in range(3)), return_exceptions=True)
    clock.advance(3.0)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 3
    assert batcher.waited_s == 0.0


async def test_who_comes_alone_waits_for_nothing_and_who_follows_several_is_gathered() -> None:
    clock = FakeClock()  # Sleeping moves it on at once: its time is the time waited.

    async def run(batch: Sequence[int]) -> Sequence[int | LoanmeshError]:
        return list(batch)

    batcher: Batcher[int, int] = Batcher(run, max_items=9, max_waiting=9, clock=clock, apart_s=1.0)
    for alone in range(3):
        await batcher.submit(alone)
    await asyncio.gather(batcher.submit(3), batcher.submit(4))
    assert clock.monotonic() == 0.0
    await batcher.submit(5)
    assert clock.monotonic() == 1.0
    await batcher.submit(6)
    assert clock.monotonic() == 1.0


async def test_several_are_let_in_together_or_not_at_all() -> None:
    batches: list[list[int]] = []

    async def run(batch: Sequence[int]) -> Sequence[int | LoanmeshError]:
        batches.append(list(batch))
        return [InvalidRequest(("n", "too large")) if n > 8 else -n for n in batch]

    batcher: Batcher[int, int] = Batcher(run, max_items=4, max_waiting=4, clock=FakeClock())
    several, one = await asyncio.gather(batcher.submit_all([1, 2]), batcher.submit(3))
    assert (several, one) == ([-1, -2], -3)
    outcomes = await asyncio.gather(batcher.submit(4), batcher.submit_all([5, 6, 7, 8]), return_exceptions=True)
    assert (outcomes[0], type(outcomes[1])) == (-4, Overloaded)
    with pytest.raises(InvalidRequest, match="too large"):
        await batcher.submit_all([8, 9])
    assert await batcher.submit_all([]) == []
    # Where nobody waits, more than may wait are let in.
    assert await batcher.submit_all([1, 2, 3, 4, 5]) == [-1, -2, -3, -4, -5]
    assert batches == [[1, 2, 3], [4], [8, 9], [1, 2, 3, 4], [5]]
    assert batcher.waited_s == 0.0


def test_a_wrong_setting_stops_the_start_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("INTAKE_LEASE__DURATION_S", "-1"), ("INTAKE_LEESE__DURATION_S", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(SystemExit) as stop:
                load(IntakeSettings)
        assert stop.value.code == 2
        assert name in capsys.readouterr().err


def test_every_setting_has_a_name() -> None:
    assert "INTAKE_WORK__BATCH_MAX" in set(names(IntakeSettings, "INTAKE_"))


def test_a_deadline_shrinks_on_the_way() -> None:
    deadline.note(10.0)
    assert deadline.remaining_s(8.0, 5.0) == pytest.approx(2.0 - deadline.RESERVE_S)
    assert deadline.remaining_s(11.0, 5.0) == 0.0
    deadline.note(None)
    assert deadline.remaining_s(8.0, 5.0) == 5.0


def test_ids_sort_by_time() -> None:
    clock = FakeClock()
    ids = []
    for _ in range(20):
        ids.append(new_uuid7(clock))
        clock.advance(0.002)
    assert ids == sorted(ids)
    assert all(uuid.UUID(i).version == 7 for i in ids)
