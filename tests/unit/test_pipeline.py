"""The pipeline over fakes: what a stage cannot say makes an application later, never declined."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Sequence

from lending.bureau.v1.bureau_service_pb2 import CreditProfile, SourceReport
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score

from loanmesh.runtime.clock import FakeClock
from services.intake.application import Claim
from services.intake.dictionary import sources
from services.intake.parking import Parking
from services.intake.pipeline import Pipeline
from services.intake.ports import Answer, Awaiting, Broken, Case, Decided, Deferred, Parked, Result, Unavailable, Unfit
from services.intake.settings import ParkingSettings
from tests.builders import a_profile, an_application

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Fake:
    """All three services and the store; answers what it was told."""

    def __init__(
        self,
        profile: CreditProfile | Unavailable | None = None,
        score: Score | Answer | None = None,
        pricing: Pricing | Answer | None = None,
    ) -> None:
        self.profile = profile or a_profile("person", 1)
        self.scored = score or Score(pd=0.1, grade="C")
        self.priced = pricing or Pricing(outcome=Pricing.OUTCOME_APPROVED)
        self.results: list[Result] = []
        self.settled: list[list[str]] = []

    async def gather(self, cases: Sequence[Case]) -> list[CreditProfile | Answer]:
        return [self.profile for _ in cases]

    async def score(self, cases: Sequence[Case]) -> list[Score | Answer]:
        return [self.scored for _ in cases]

    async def price(self, cases: Sequence[Case]) -> list[Pricing | Answer]:
        return [self.priced for _ in cases]

    async def settle(self, results: Sequence[Result]) -> set[str]:
        self.settled.append([result.claim.id for result in results])
        self.results.extend(results)
        return {result.claim.id for result in results}


def a_claim(id_: str = "id", attempts: int = 1, faults: int = 0, payload: bytes | None = None) -> Claim:
    said = an_application().SerializeToString() if payload is None else payload
    return Claim(id_, "lenders/demo", 1, 1, attempts, 1, "", said, "[]", 1.7e9, traceparent=TRACEPARENT, faults=faults)


def a_pipeline(fake: Fake, clock: FakeClock, reports: list[str] | None = None, **parking: float) -> Pipeline:
    told = [] if reports is None else reports
    settings = ParkingSettings.model_validate(parking)
    return Pipeline(
        fake, fake, fake, fake, clock, random.Random(1), 14, Parking(settings, clock, random.Random(1)),
        lambda event, **_: told.append(event), sources(),
    )  # fmt: skip


async def decide(fake: Fake, attempts: int = 1, clock: FakeClock | None = None, without_consent: str = "") -> Result:
    clock = clock or FakeClock()
    application = an_application()
    for consent in [c for c in application.consents if c.source == without_consent]:
        application.consents.remove(consent)
    claim = a_claim(attempts=attempts, payload=application.SerializeToString())
    await a_pipeline(fake, clock).decide_batch([claim])
    return fake.results[0]


async def test_three_answers_make_a_decision() -> None:
    result = await decide(Fake())
    assert isinstance(result, Decided)
    assert (result.outcome, result.grade) == ("APPROVED", "C")


async def test_a_dead_stage_defers_with_its_name() -> None:
    for fake in (Fake(profile=Unavailable("bureau_unavailable")), Fake(score=Unavailable("scoring_unavailable")),
                 Fake(pricing=Unavailable("pricing_unavailable"))):  # fmt: skip
        result = await decide(fake)
        assert isinstance(result, Deferred)
        assert result.waiting_for[0].endswith("_unavailable")


async def test_waiting_grows_and_is_bounded() -> None:
    waits = []
    for attempts in (1, 3, 30):
        result = await decide(Fake(score=Unavailable("scoring_unavailable")), attempts)
        assert isinstance(result, Deferred)
        waits.append(result.retry_s)
    assert waits == sorted(waits)
    assert waits[-1] <= 24


async def test_a_decline_on_stale_or_missing_evidence_is_never_committed() -> None:
    for state in (SourceReport.STATE_STALE, SourceReport.STATE_MISSING, SourceReport.STATE_NO_CONSENT):
        profile = a_profile("person", 1, states={"tax": state})
        result = await decide(Fake(profile=profile, pricing=Pricing(outcome=Pricing.OUTCOME_DECLINED)))
        assert not isinstance(result, Decided)


async def test_a_decline_on_evidence_that_ran_out_on_the_way_is_never_committed() -> None:
    clock = FakeClock()
    clock.advance(dt.timedelta(days=2).total_seconds())
    result = await decide(Fake(pricing=Pricing(outcome=Pricing.OUTCOME_DECLINED)), clock=clock)
    assert isinstance(result, Deferred)


async def test_a_missing_consent_asks_the_applicant() -> None:
    profile = a_profile("person", 1, states={"tax": SourceReport.STATE_NO_CONSENT})
    pricing = Pricing(outcome=Pricing.OUTCOME_UNDETERMINED, missing_sources=["tax"])
    result = await decide(Fake(profile=profile, pricing=pricing), without_consent="tax")
    assert isinstance(result, Awaiting)
    assert result.missing == ({"field": "consents", "source": "tax", "reason": "CONSENT_MISSING"},)


async def test_a_product_that_does_not_exist_asks_the_applicant() -> None:
    result = await decide(Fake(pricing=Unfit("loan.product", "INVALID_REQUEST")))
    assert isinstance(result, Awaiting)


async def test_a_consent_that_only_bureaus_clock_refuses_is_no_matter_of_the_applicants() -> None:
    profile = a_profile("person", 1, states={"tax": SourceReport.STATE_NO_CONSENT})
    pricing = Pricing(outcome=Pricing.OUTCOME_UNDETERMINED, missing_sources=["tax"])
    result = await decide(Fake(profile=profile, pricing=pricing))
    assert isinstance(result, Deferred)
    assert result.waiting_for == ("consent_not_in_force:tax",)


async def test_no_decline_rests_on_a_profile_without_reports() -> None:
    result = await decide(Fake(profile=CreditProfile(), pricing=Pricing(outcome=Pricing.OUTCOME_DECLINED)))
    assert isinstance(result, Deferred)


async def test_no_decline_rests_on_a_profile_that_leaves_a_source_out() -> None:
    for left_out in sources():
        profile = a_profile("person", 1)
        kept = [report for report in profile.reports if report.source != left_out]
        partial = CreditProfile(reports=kept, gather_time=profile.gather_time)
        result = await decide(Fake(profile=partial, pricing=Pricing(outcome=Pricing.OUTCOME_DECLINED)))
        assert isinstance(result, Deferred)
        assert result.waiting_for == (f"source_missing:{left_out}",)


async def test_a_decline_on_a_whole_profile_is_committed() -> None:
    for kind in ("person", "firm"):
        result = await decide(Fake(profile=a_profile(kind, 1), pricing=Pricing(outcome=Pricing.OUTCOME_DECLINED)))
        assert isinstance(result, Decided)


# --- What breaks a stage ---


async def test_what_breaks_a_stage_at_each_attempt_is_parked_with_its_cause() -> None:
    fake, clock, reports = Fake(score=Broken("scoring_error", "KeyError")), FakeClock(), list[str]()
    pipeline = a_pipeline(fake, clock, reports, attempts_max=3, due_hours=24)
    for faults in range(3):
        await pipeline.decide_batch([a_claim(faults=faults)])
    once, twice, parked = fake.results
    assert isinstance(once, Deferred)
    assert isinstance(twice, Deferred)
    assert (once.broke, twice.broke, once.waiting_for) == (True, True, ("scoring_error",))
    assert twice.retry_s > once.retry_s
    assert isinstance(parked, Parked)
    assert (parked.stage, parked.broken) == ("score", Broken("scoring_error", "KeyError"))
    assert parked.due_at == parked.at + 86400
    assert reports == ["application_parked"]


async def test_a_dead_dependency_or_a_missing_source_never_parks() -> None:
    undetermined = Pricing(outcome=Pricing.OUTCOME_UNDETERMINED, missing_sources=["tax"])
    for fake in (Fake(score=Unavailable("scoring_unavailable")), Fake(pricing=undetermined)):
        pipeline = a_pipeline(fake, FakeClock(), attempts_max=1)
        await pipeline.decide_batch([a_claim(attempts=1000, faults=0)])
        (result,) = fake.results
        assert isinstance(result, Deferred)
        assert not result.broke


async def test_a_bug_of_our_own_sets_apart_whom_it_meets_and_nobody_else() -> None:
    fake, reports = Fake(), list[str]()
    pipeline = a_pipeline(fake, FakeClock(), reports, attempts_max=2)
    claims = [a_claim(str(number)) for number in range(7)]
    claims[3] = a_claim("3", faults=1, payload=b"no application")
    told = await pipeline.decide_batch(claims)
    assert [isinstance(told[str(n)], Decided) for n in range(7)] == [True, True, True, False, True, True, True]
    parked = told["3"]
    assert isinstance(parked, Parked)
    assert (parked.stage, parked.broken.error_type) == ("open", "DecodeError")
    # Three halvings find it among seven; each part of the batch is committed once.
    assert reports.count("stage_broke") == 4
    assert sorted(id_ for part in fake.settled for id_ in part) == [str(n) for n in range(7)]


async def test_a_fault_that_no_applicant_can_mend_is_not_asked_of_them() -> None:
    result = await decide(Fake(pricing=Unfit("score.pd", "INVALID_REQUEST")))
    assert isinstance(result, Deferred)
    assert (result.waiting_for, result.broke) == (("price_refused",), True)


async def test_a_mass_of_broken_applications_is_a_stage_that_is_down() -> None:
    fake, clock = Fake(score=Broken("scoring_error", "KeyError")), FakeClock()
    pipeline = a_pipeline(fake, clock, attempts_max=5, mass_min=10, window=50)
    for number in range(1000):
        await pipeline.decide_batch([a_claim(str(number), attempts=5, faults=4)])
    parked = [result for result in fake.results if isinstance(result, Parked)]
    assert len(parked) == 9
    assert isinstance(fake.results[-1], Deferred)
    assert not fake.results[-1].broke
    assert fake.results[-1].retry_s <= 24


async def test_once_a_mended_stage_has_been_well_for_a_while_single_ones_are_parked_again() -> None:
    fake, clock = Fake(score=Broken("scoring_error", "KeyError")), FakeClock()
    pipeline = a_pipeline(fake, clock, attempts_max=5, mass_min=10, window=50)
    await pipeline.decide_batch([a_claim(str(number), faults=4) for number in range(30)])
    broken, fake.scored = fake.scored, Score(pd=0.1, grade="C")
    for number in range(200):
        await pipeline.decide_batch([a_claim(f"well-{number}")])
    fake.scored = broken
    kinds = []
    for _ in range(2):
        await pipeline.decide_batch([a_claim("alone", faults=4)])
        kinds.append(type(fake.results[-1]))
        clock.advance(31)
    assert kinds == [Deferred, Parked]
