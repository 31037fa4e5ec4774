"""Work in the background goes on after a round that failed, and says so once."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.lasting import Lasting
from loanmesh.runtime.loop_lag import Heartbeat
from loanmesh.runtime.vitals import Vitals
from services.intake.erasure import Upkeep
from services.intake.keeping import Keeping
from services.intake.retention import RetentionSettings


def rounds(lasting: Lasting, *errors: Exception | None) -> None:
    for error in errors:
        with lasting:
            if isinstance(error, KeyError):
                raise error
            if error:
                raise error


def test_a_cause_is_told_when_it_begins_and_when_it_comes_again() -> None:
    with capture_logs() as logs:
        rounds(Lasting("sweep"), ValueError("at 1"), ValueError("at 2"), KeyError("x"), None, KeyError("x"))
    assert [(line["event"], line["work"], line["error_type"]) for line in logs] == [
        ("round_failed", "sweep", "ValueError"), ("round_failed", "sweep", "KeyError"),
        ("round_failed", "sweep", "KeyError"),
    ]  # fmt: skip


def test_cancellation_passes() -> None:
    with pytest.raises(asyncio.CancelledError), Lasting("sweep"):
        raise asyncio.CancelledError


class Turns(FakeClock):
    """A clock on which each sleep is over at once; after so many, whoever sleeps is cancelled."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self._left = left

    async def sleep(self, seconds: float) -> None:
        self._left -= 1
        if self._left < 0:
            raise asyncio.CancelledError
        self.advance(seconds)


async def test_the_heart_beats_on_when_a_lag_cannot_be_recorded() -> None:
    told: list[float] = []

    def record(lag_s: float) -> None:
        told.append(lag_s)
        raise RuntimeError("no meter")

    with pytest.raises(asyncio.CancelledError):
        await Heartbeat(Turns(5), record).beat_forever()
    assert len(told) == 5


class NoReseal(Keeping):
    """Cannot reseal, for a reason that nobody foresaw, and finds nothing else to do; notes which passes began."""

    def __init__(self) -> None:
        self.began: list[str] = []

    async def take(self, chore: str) -> tuple[str, str] | None:
        self.began.append(chore)
        if chore == "reseal":
            raise ZeroDivisionError
        return None


async def test_erasures_go_on_where_nothing_can_be_sealed_anew() -> None:
    keeping, clock = NoReseal(), Turns(2)
    upkeep = Upkeep(keeping, RetentionSettings(), lambda: "goal", clock, 10, lambda *_, **__: None)
    with pytest.raises(asyncio.CancelledError), capture_logs() as logs:
        await upkeep.keep_forever(60.0)
    assert keeping.began == ["reseal", "erase", "forget"] * 2
    assert [line["work"] for line in logs] == ["reseal"], "said once"


async def test_vitals_go_on_when_the_backlog_cannot_be_counted_for_a_reason_that_nobody_foresaw() -> None:
    counted: list[int] = []

    async def count() -> int:
        counted.append(1)
        if len(counted) == 1:
            raise ZeroDivisionError
        return 7

    vitals = Vitals(count_backlog=count)
    with pytest.raises(asyncio.CancelledError):
        await vitals.sample_forever(Turns(50))
    assert vitals.backlog == 7
