"""A clock with a witness: believed while the two agree, corrected while they do not."""

from __future__ import annotations

import datetime as dt

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.witness import ASK_EVERY_S, BOUND_S, WitnessedClock

TRUE = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)


class Witness:
    """Knows the time; takes `took_s` to say it, half each way; away when told so."""

    def __init__(self, own: FakeClock, took_s: float = 0.0) -> None:
        self._own = own
        self.took_s = took_s
        self.away = False
        self.asked = 0

    async def __call__(self) -> float:
        self.asked += 1
        self._own.advance(self.took_s / 2)
        if self.away:
            raise DependencyDown("away")
        now_s = TRUE.timestamp() + self._own.monotonic()
        self._own.advance(self.took_s / 2)
        return now_s


def a_clock(off_s: float, took_s: float = 0.0) -> tuple[WitnessedClock, FakeClock, Witness, list[float]]:
    own = FakeClock(TRUE + dt.timedelta(seconds=off_s))
    told: list[float] = []
    witness = Witness(own, took_s)
    return WitnessedClock(own, witness, told.append), own, witness, told


@pytest.mark.parametrize("off_s", [-4000.0, -301.0, 301.0, 4000.0])
async def test_a_clock_that_is_off_is_corrected_and_told_of_once(off_s: float) -> None:
    clock, own, _, told = a_clock(off_s)
    assert not clock.is_sure
    for _ in range(3):
        await clock.look()
    own.advance(7.0)
    assert clock.is_sure
    assert abs((clock.now() - TRUE).total_seconds() - 7.0) < 1e-3
    assert told == [pytest.approx(off_s)]
    assert clock.step.check()
    assert ("ahead of" if off_s > 0 else "behind") in clock.step.cause


async def test_a_clock_that_is_about_right_is_left_alone() -> None:
    clock, own, _, told = a_clock(-1.5)
    await clock.look()
    assert clock.now() == own.now()
    assert (told, clock.step.check()) == ([], False)


async def test_a_jump_after_the_last_look_is_seen_at_once() -> None:
    clock, own, _, _ = a_clock(0.0)
    await clock.look()
    own._now -= dt.timedelta(hours=1)
    own.advance(2.0)
    assert abs((clock.now() - TRUE).total_seconds() - 2.0) < 1e-3


async def test_a_witness_that_is_slow_to_answer_corrects_no_clock_that_may_be_right() -> None:
    clock, own, _, told = a_clock(0.0, took_s=30.0)
    await clock.look()
    assert (clock.now(), told, clock.ahead_s) == (own.now(), [], 0.0)
    late, _, _, _ = a_clock(-4000.0, took_s=30.0)
    await late.look()
    assert late.now() > TRUE - dt.timedelta(seconds=BOUND_S)


async def test_its_last_word_stands_while_the_witness_is_away() -> None:
    clock, own, witness, _ = a_clock(-4000.0)
    await clock.look()
    witness.away = True
    with pytest.raises(DependencyDown):
        await clock.look()
    own.advance(3600.0)
    assert abs((clock.now() - TRUE).total_seconds() - 3600.0) < 1e-3


async def test_nobody_heard_yet_leaves_our_own_and_says_so() -> None:
    clock, own, _, _ = a_clock(-4000.0)
    assert (clock.now(), clock.is_sure, clock.ahead_s, clock.step.check()) == (own.now(), False, 0.0, False)


async def test_it_looks_again_and_again_whether_the_witness_is_there_or_not() -> None:
    clock, own, witness, _ = a_clock(0.0)
    witness.away = True

    class Enough(Exception):
        """Ends the loop."""

    async def sleep(seconds: float) -> None:
        assert seconds == ASK_EVERY_S
        own.advance(seconds)
        if witness.asked == 4:
            raise Enough

    own.sleep = sleep  # type: ignore[method-assign]  # Ends what never does.
    with pytest.raises(Enough):
        await clock.look_forever()
    assert witness.asked == 4
