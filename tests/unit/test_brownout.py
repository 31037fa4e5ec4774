"""Bureau under overload: named steps, said in the report and in the decision, left by themselves, never a decline."""

from __future__ import annotations

import asyncio
import datetime as dt
import random
from collections.abc import Mapping, Sequence

import pytest
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest, SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.guard import BulkheadSettings, make_guard
from loanmesh.runtime.setting_rules import WrongSetting
from services.bureau.brownout import Brownout
from services.bureau.gather import Gatherer, Key, Subject
from services.bureau.main import build
from services.bureau.profile import Answer
from services.bureau.settings import BrownoutSettings, BureauSettings
from services.bureau.sources import DAY_S, Source, load_sources
from services.pricing.decide import price
from services.pricing.policy import load_policy
from tests.builders import POPULATION, an_application

BUDGET_S = 1.0
POLICY = load_policy("cn-demo-2026-11")


class Sources:
    """A wire whose sources know the population; one of them may be slow, or say that it is too busy."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.asked: list[str] = []
        self.slow = ""
        self.busy = ""
        self.let = asyncio.Event()
        self.facts: dict[str, object] = {}

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        self.asked.append(source.id)
        if source.id == self.slow:
            await self.let.wait()
        if source.id == self.busy:
            return "overloaded"
        now_s = self.clock.now().timestamp()
        known = {**POPULATION.subject("firm", 1).facts, **self.facts}
        facts = {name: value for name, value in known.items() if name in source.types["firm"] and value is not None}
        return Answer(True, facts, now_s, now_s)


class Memory:
    """A cache in memory."""

    def __init__(self) -> None:
        self.held: dict[Key, Answer] = {}

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        return {key: self.held[key] for key in keys if key in self.held}

    async def put(self, key: Key, answer: Answer) -> None:
        self.held[key] = answer


class Bureau:
    """A gatherer with one query at a time and source, so that a queue is easily made."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.wire = Sources(self.clock)
        known = load_sources()
        bulkhead = BulkheadSettings(at_once_max=1, waiting_max=100)
        guards = {
            name: make_guard(name, "source", BreakerSettings(), bulkhead, self.clock, random.Random(1))
            for name in known
        }
        brownouts = {name: Brownout(guard, BrownoutSettings(), BUDGET_S, self.clock) for name, guard in guards.items()}
        self.steps = {(s.name, s.subject): s for brownout in brownouts.values() for s in brownout.steps}
        self.gatherer = Gatherer(
            known, self.wire, Memory(), self.clock, lambda _, n: f"h{n}", guards=guards, budget_s=0.02, retry_s=1.0,
            brownouts=brownouts,
        )  # fmt: skip

    async def look(self, index: int) -> CreditProfile:
        """One firm's profile."""
        one = an_application("firm", index, self.clock.now())
        item = GatherProfilesRequest.Item(key="k", lender="lenders/demo", party=one.parties[0], consents=one.consents)
        (profile,) = await self.gatherer.gather([item])
        return profile

    async def press(self, source: str, wait_s: float) -> None:
        """Make the source slow, and a queue before it whose first has waited so long."""
        self.wire.slow = source
        self.wire.let.clear()
        for index in (90, 91):
            await self.look(index)
        self.clock.advance(wait_s)

    async def relieve(self) -> None:
        """The source answers again, and all that waits is answered."""
        self.wire.let.set()
        self.wire.slow = ""
        while self.gatherer._under_way:
            await self.clock.sleep(0)


def of(profile: CreditProfile, source: str) -> SourceReport:
    return next(report for report in profile.reports if report.source == source)


def priced(profile: CreditProfile, now: dt.datetime) -> Pricing:
    application = an_application("firm", 1, now)
    item = PriceApplicationsRequest.Item(
        key="k", lender="lenders/demo", party_kind=Party.KIND_FIRM, loan=application.loan,
        declaration=application.declaration, profile=profile, score=Score(pd=0.03, grade="A"),
    )  # fmt: skip
    return price(item, POLICY, now)


async def test_an_overloaded_source_is_not_asked_again_for_what_is_still_usable() -> None:
    bureau = Bureau()
    await bureau.look(1)
    bureau.clock.advance(2 * DAY_S)
    await bureau.press("court", wait_s=0.5)
    bureau.wire.asked.clear()
    report = of(await bureau.look(1), "court")
    assert (report.state, report.degradation) == (SourceReport.STATE_STALE, "serve_cached")
    assert "court" not in bureau.wire.asked
    assert "central_bank" in bureau.wire.asked  # Not overloaded: asked as usual.


async def test_what_is_fresh_is_served_as_ever_and_what_is_unknown_is_still_asked() -> None:
    bureau = Bureau()
    await bureau.look(1)
    await bureau.press("court", wait_s=3)
    assert of(await bureau.look(1), "court").state == SourceReport.STATE_FRESH
    unknown = of(await bureau.look(2), "court")
    assert (unknown.missing_cause, unknown.degradation) == ("timeout", "")
    await bureau.relieve()
    assert of(await bureau.look(2), "court").state == SourceReport.STATE_FRESH


async def test_an_optional_source_is_skipped_only_when_the_queue_eats_the_budget() -> None:
    bureau = Bureau()
    await bureau.press("bank_flow", wait_s=0.9)
    assert of(await bureau.look(2), "bank_flow").degradation == ""
    bureau.clock.advance(0.2)
    skipped = of(await bureau.look(3), "bank_flow")
    assert (skipped.state, skipped.missing_cause) == (SourceReport.STATE_MISSING, "skipped")
    assert skipped.degradation == "skip_optional_sources"
    assert skipped.HasField("retry_time")


async def test_an_optional_source_that_does_not_exist_stops_the_start() -> None:
    settings = BureauSettings(brownout=BrownoutSettings(optional=("moon",)))
    with pytest.raises(WrongSetting, match="BUREAU_BROWNOUT__OPTIONAL: no such source: moon"):
        await build(settings, FakeClock())


async def test_a_source_that_says_it_is_too_busy_is_believed_for_a_while() -> None:
    bureau = Bureau()
    await bureau.look(1)
    bureau.clock.advance(2 * DAY_S)
    bureau.wire.busy = "court"
    assert of(await bureau.look(2), "court").missing_cause == "overloaded"
    assert of(await bureau.look(1), "court").degradation == "serve_cached"
    bureau.wire.busy = ""
    for _ in range(2):
        bureau.clock.advance(2)  # A second of belief, then two of calm.
        await bureau.look(1)
    assert of(await bureau.look(1), "court").state == SourceReport.STATE_FRESH


async def test_it_recovers_by_itself_and_asks_again() -> None:
    bureau = Bureau()
    await bureau.look(1)
    bureau.clock.advance(2 * DAY_S)
    await bureau.press("court", wait_s=2)
    assert of(await bureau.look(1), "court").degradation == "serve_cached"
    await bureau.relieve()
    step = bureau.steps["serve_cached", "court"]
    assert step.check()  # Calm has only begun.
    bureau.clock.advance(2)
    report = of(await bureau.look(1), "court")
    assert (report.state, report.degradation) == (SourceReport.STATE_FRESH, "")
    assert not step.in_force


async def test_the_step_is_recorded_in_what_pricing_decides() -> None:
    bureau = Bureau()
    await bureau.look(1)
    bureau.clock.advance(2 * DAY_S)
    await bureau.press("court", wait_s=2)
    cached = priced(await bureau.look(1), bureau.clock.now())
    assert cached.outcome in (Pricing.OUTCOME_APPROVED, Pricing.OUTCOME_COUNTER_OFFER)
    assert list(cached.degradations) == ["serve_cached:court"]

    bureau = Bureau()
    await bureau.press("bank_flow", wait_s=2)
    skipped = priced(await bureau.look(1), bureau.clock.now())
    assert skipped.outcome in (Pricing.OUTCOME_APPROVED, Pricing.OUTCOME_COUNTER_OFFER)
    assert list(skipped.degradations) == ["without_bank_flow", "skip_optional_sources:bank_flow"]


@pytest.mark.parametrize("source", ["court", "bank_flow"])
async def test_no_step_lets_a_decline_through(source: str) -> None:
    """Evidence that would decline, once it is served from the cache or lacks a source, leaves the outcome open."""
    bureau = Bureau()
    bureau.wire.facts["court.is_dishonest_debtor"] = True
    complete = priced(await bureau.look(1), bureau.clock.now())
    assert complete.outcome == Pricing.OUTCOME_DECLINED
    bureau.clock.advance(2 * DAY_S if source == "court" else 8 * DAY_S)  # Usable; or not even that.
    await bureau.press(source, wait_s=2)
    profile = await bureau.look(1)
    assert of(profile, source).degradation
    left_out = priced(profile, bureau.clock.now())
    assert left_out.outcome == Pricing.OUTCOME_UNDETERMINED
    assert source in left_out.missing_sources
