"""Gathering under trouble: breakers, bulkheads, overload and bugs cost a fact, never a batch."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence

import pytest
from lending.bureau.v1.bureau_service_pb2 import GatherProfilesRequest, SourceReport

from loanmesh.runtime.breaker import Breaker, BreakerSettings, State
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.guard import BulkheadSettings, make_guard
from services.bureau.gather import Cache, Gatherer, Key, Subject
from services.bureau.profile import Answer
from services.bureau.sources import DAY_S, Source, load_sources
from tests.builders import an_application


class Court:
    """A wire on which all sources are well but the court, which does what it is told."""

    def __init__(self, clock: FakeClock, does: Callable[[], Answer | str | None] = lambda: None) -> None:
        self.clock = clock
        self.does = does
        self.asked = self.at_once = self.at_once_max = 0
        self.hold: asyncio.Event | None = None

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        now_s = self.clock.now().timestamp()
        if source.id != "court":
            return Answer(True, {}, now_s, now_s)
        self.asked += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        try:
            if self.hold:
                await self.hold.wait()
            return self.does() or Answer(True, {}, now_s, now_s)
        finally:
            self.at_once -= 1


class NoCache:
    """Remembers nothing."""

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        return {}

    async def put(self, key: Key, answer: Answer) -> None: ...


def a_bureau(
    court: Court, waiting_max: int = 100, budget_s: float = 5.0, cache: Cache | None = None
) -> tuple[Gatherer, Breaker]:
    settings = BreakerSettings(window=10, minimum_calls=4, open_s=10, jitter=0, half_open_permits=2)
    bulkhead = BulkheadSettings(at_once_max=3, waiting_max=waiting_max)
    sources = load_sources()
    guards = {name: make_guard(name, "source", settings, bulkhead, court.clock, random.Random(1)) for name in sources}
    gatherer = Gatherer(
        sources,
        court,
        cache or NoCache(),
        court.clock,
        lambda _, n: f"h{n}",
        guards=guards,
        budget_s=budget_s,
        retry_s=1.0,
    )
    return gatherer, guards["court"].breaker


def items(count: int) -> list[GatherProfilesRequest.Item]:
    made = []
    for index in range(count):
        one = an_application("firm", index)
        made.append(
            GatherProfilesRequest.Item(key="k", lender="lenders/demo", party=one.parties[0], consents=one.consents)
        )
    return made


async def court_reports(gatherer: Gatherer, count: int) -> list[SourceReport]:
    profiles = await gatherer.gather(items(count))
    assert all(r.state == SourceReport.STATE_FRESH for p in profiles for r in p.reports if r.source != "court")
    return [r for p in profiles for r in p.reports if r.source == "court"]


async def test_a_dead_source_is_left_alone_then_probed_by_demand() -> None:
    clock = FakeClock()
    court = Court(clock, lambda: "unavailable")
    gatherer, breaker = a_bureau(court)
    await court_reports(gatherer, 4)
    assert breaker.state is State.OPEN
    (report,) = await court_reports(gatherer, 1)
    assert (court.asked, report.missing_cause) == (4, "breaker_open")
    assert report.retry_time.ToDatetime() == breaker.retry_at.replace(tzinfo=None)

    clock.advance(10)
    court.does = lambda: None
    causes = [r.missing_cause for r in await court_reports(gatherer, 1)] + [
        r.missing_cause for r in await court_reports(gatherer, 1)
    ]
    assert (causes, breaker.state, court.asked) == (["", ""], State.CLOSED, 6)


async def test_half_open_asks_for_its_permits_only() -> None:
    clock = FakeClock()
    court = Court(clock, lambda: "timeout")
    gatherer, _ = a_bureau(court)
    await court_reports(gatherer, 4)
    clock.advance(10)
    court.hold = asyncio.Event()
    work = asyncio.create_task(court_reports(gatherer, 50))
    while court.asked < 6:
        await clock.sleep(0)
    court.hold.set()
    causes = [r.missing_cause for r in await work]
    assert court.asked == 6
    assert sorted(set(causes)) == ["breaker_open", "timeout"]


async def test_queries_beyond_the_permits_wait_for_the_probes_and_are_asked_in_the_same_look() -> None:
    clock = FakeClock()
    court = Court(clock, lambda: "timeout")
    gatherer, breaker = a_bureau(court)
    await court_reports(gatherer, 4)
    clock.advance(10)
    court.does = lambda: None
    assert {r.missing_cause for r in await court_reports(gatherer, 50)} == {""}
    assert (breaker.state, court.asked) == (State.CLOSED, 54)


class Remembers(NoCache):
    """Knows an answer of the court, of so many days ago."""

    def __init__(self, clock: FakeClock, days: float) -> None:
        at_s = clock.now().timestamp() - days * DAY_S
        self.known = Answer(True, {"court.enforcement_open_count": 1}, at_s, at_s)

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        return {key: self.known for key in keys if key[2] == "court"}


@pytest.mark.parametrize(
    ("says_days", "knows_days", "state", "observed_days"),
    [
        (8.0, None, SourceReport.STATE_MISSING, None),
        (8.0, 9.0, SourceReport.STATE_MISSING, None),
        (6.0, None, SourceReport.STATE_STALE, 6.0),
        (8.0, 5.0, SourceReport.STATE_STALE, 5.0),
        (3.0, 2.0, SourceReport.STATE_STALE, 2.0),
        (0.5, 2.0, SourceReport.STATE_FRESH, 0.5),
    ],
)
async def test_what_a_source_says_now_counts_by_when_it_was_true(
    says_days: float, knows_days: float | None, state: SourceReport.State.ValueType, observed_days: float | None
) -> None:
    court = Court(FakeClock())
    now_s = court.clock.now().timestamp()
    court.does = lambda: Answer(True, {}, now_s - says_days * DAY_S, now_s)
    gatherer, _ = a_bureau(court, cache=NoCache() if knows_days is None else Remembers(court.clock, knows_days))
    (report,) = await court_reports(gatherer, 1)
    assert (report.state, report.missing_cause) == (state, "" if observed_days else "outdated")
    if observed_days:
        assert now_s - report.observed_time.ToNanoseconds() / 1e9 == pytest.approx(observed_days * DAY_S)


@pytest.mark.parametrize("word", ["refused", "overloaded"])
async def test_what_is_not_the_sources_fault_opens_nothing(word: str) -> None:
    court = Court(FakeClock(), lambda: word)
    gatherer, breaker = a_bureau(court)
    assert {r.missing_cause for r in await court_reports(gatherer, 40)} == {word}
    assert (breaker.state, court.asked) == (State.CLOSED, 40)


async def test_the_bulkhead_bounds_what_is_asked_and_what_waits() -> None:
    court = Court(FakeClock())
    court.hold = asyncio.Event()
    gatherer, _ = a_bureau(court, waiting_max=10)
    work = asyncio.create_task(court_reports(gatherer, 30))
    while court.at_once < 3:
        await court.clock.sleep(0)
    court.hold.set()
    causes = [r.missing_cause for r in await work]
    assert court.at_once_max == 3
    assert sorted(causes) == [""] * 13 + ["bulkhead_full"] * 17


async def test_a_bug_costs_one_fact_and_gives_its_permit_back() -> None:
    def bug() -> str:
        raise AssertionError("a bug")

    court = Court(FakeClock(), bug)
    gatherer, breaker = a_bureau(court)
    assert {r.missing_cause for r in await court_reports(gatherer, 20)} == {"fault"}
    assert breaker.state is State.CLOSED


async def test_a_cancelled_caller_leaves_the_query_to_others() -> None:
    court = Court(FakeClock())
    court.hold = asyncio.Event()
    gatherer, _ = a_bureau(court)
    caller = asyncio.create_task(gatherer.gather(items(1)))
    while not court.asked:
        await court.clock.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    other = asyncio.create_task(court_reports(gatherer, 1))
    await court.clock.sleep(0)
    court.hold.set()
    assert [r.state for r in await other] == [SourceReport.STATE_FRESH]
    assert court.asked == 1


async def test_closing_gives_up_what_is_under_way_and_returns_permits() -> None:
    court = Court(FakeClock())
    court.hold = asyncio.Event()
    gatherer, breaker = a_bureau(court, budget_s=0.01)
    await court_reports(gatherer, 8)
    assert court.at_once == 3
    await gatherer.close()
    assert (court.at_once, breaker.state) == (0, State.CLOSED)


async def test_reports_bills_and_the_age_of_evidence_are_counted_for_each_source() -> None:
    court = Court(FakeClock())
    gatherer, _ = a_bureau(court)
    await gatherer.gather(items(2))
    court.does = lambda: "unavailable"
    await gatherer.gather(items(1))
    figures = gatherer.figures
    assert figures["court"].reports == {"fresh": 2, "missing": 1}
    assert figures["court"].answered == 2
    assert figures["tax"].answered == 3
    assert figures["court"].observed_at == court.clock.now().timestamp()


async def test_a_batch_that_cannot_be_told_of_is_answered_all_the_same() -> None:
    gatherer, _ = a_bureau(Court(FakeClock()))

    def fails(*_: object) -> None:
        raise ValueError("no such span")

    gatherer._follow = fails
    (report,) = await court_reports(gatherer, 1)
    assert report.state == SourceReport.STATE_FRESH
