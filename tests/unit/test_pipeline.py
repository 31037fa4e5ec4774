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
from services.intake.pipeline import Pipeline
from services.intake.ports import Awaiting, Case, Decided, Deferred, Result, Unavailable, Unfit
from tests.builders import a_profile, an_application


class Fake:
    """All three services and the store; answers what it was told."""

    def __init__(
        self,
        profile: CreditProfile | Unavailable | None = None,
        score: Score | Unavailable | None = None,
        pricing: Pricing | Unavailable | Unfit | None = None,
    ) -> None:
        self.profile = profile or a_profile("person", 1)
        self.scored = score or Score(pd=0.1, grade="C")
        self.priced = pricing or Pricing(outcome=Pricing.OUTCOME_APPROVED)
        self.results: list[Result] = []

    async def gather(self, cases: Sequence[Case]) -> list[CreditProfile | Unavailable | Unfit]:
        return [self.profile for _ in cases]

    async def score(self, cases: Sequence[Case]) -> list[Score | Unavailable | Unfit]:
        return [self.scored for _ in cases]

    async def price(self, cases: Sequence[Case]) -> list[Pricing | Unavailable | Unfit]:
        return [self.priced for _ in cases]

    async def settle(self, results: Sequence[Result]) -> set[str]:
        self.results.extend(results)
        return {result.claim.id for result in results}


async def decide(fake: Fake, attempts: int = 1, clock: FakeClock | None = None, without_consent: str = "") -> Result:
    clock = clock or FakeClock()
    application = an_application()
    for consent in [c for c in application.consents if c.source == without_consent]:
        application.consents.remove(consent)
    claim = Claim("id", "lenders/demo", 1, 1, attempts, 1, "", application.SerializeToString(), "[]", 1.7e9)
    pipeline = Pipeline(fake, fake, fake, fake, clock, random.Random(1), information_days=14)
    await pipeline.decide_batch([claim])
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
