"""Decisions and scores of a few hundred synthetic cases, byte for byte: work on speed must change none of them.

A change of policy, model or population changes the digests too, and is meant to: take over the new one then, after
looking at what changed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import random
from collections.abc import Iterator
from typing import Any, cast

from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, PriceApplicationsResponse, Pricing
from lending.scoring.v1 import scoring_service_pb2 as scoring
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.party_pb2 import Party

from lab.population import SOURCES, Kind
from loanmesh.runtime.clock import FakeClock
from services.pricing.policy import load_policy
from services.pricing.servicer import PricingServicer
from services.scoring.model import load_model
from services.scoring.servicer import ScoringServicer
from tests.builders import NOW, POPULATION, a_profile

CASES = 400
CONTEXT = cast(Any, None)
PARTIES: dict[Kind, Party.Kind.ValueType] = {"person": Party.KIND_PERSON, "firm": Party.KIND_FIRM}
STATES = SourceReport.State.values()
PRICED = "ca2f6cced808eb9940d9262cfb2ed05bfee0bbe27da8cf54d8a038cee05690af"
SCORED = "e0fb15cfe971e35ecb0d0d237bbddd24ab31dfa4e2e87df76b69224b8fa1e706"


def profile_of(dice: random.Random, kind: Kind, index: int) -> Any:
    """A profile; in every other one, sources are silent, old, expired, spared or wrong now and then."""
    if dice.random() < 0.5:
        return a_profile(kind, index)
    states = {source: dice.choice(STATES) for source in SOURCES if dice.random() < 0.1}
    profile = a_profile(kind, index, states=states)
    for report in profile.reports:
        if dice.random() < 0.04:
            report.usable_until_time.FromDatetime(NOW - dt.timedelta(seconds=1))
        if dice.random() < 0.04:
            report.degradation = "serve_cached"
        for attribute in list(report.attributes):
            if dice.random() < 0.02:
                attribute.value.text = "?"
            elif dice.random() < 0.02:
                report.attributes.remove(attribute)
            elif dice.random() < 0.05:
                attribute.observed_time.FromDatetime(NOW - dt.timedelta(hours=1))
    return profile


def priced_items(kind: Kind) -> Iterator[PriceApplicationsRequest.Item]:
    dice = random.Random(kind)
    for index in range(CASES):
        facts = POPULATION.subject(kind, index).facts
        pd = dice.choice((0.003, 0.03, 0.08, 0.12, 0.16, 0.185, 0.21, 0.26)) * dice.uniform(0.9, 1.1)
        item = PriceApplicationsRequest.Item(
            key=str(index),
            lender="lenders/demo",
            party_kind=PARTIES[kind],
            loan=LoanRequest(
                amount_fen=dice.choice((100_000, 2_000_000, 15_000_000, 55_000_000, 200_000_000)) + dice.randrange(99),
                term_months=dice.choice((1, 3, 6, 12, 24, 36, 60)),
                purpose="装修",
                purpose_kind=dice.choice((LoanRequest.PURPOSE_KIND_CONSUMPTION, LoanRequest.PURPOSE_KIND_SECURITIES))
                if dice.random() < 0.1
                else LoanRequest.PURPOSE_KIND_WORKING_CAPITAL,
            ),
            profile=profile_of(dice, kind, index),
            score=Score(pd=pd, grade=dice.choice("AABBCCDE")),
        )
        if kind == "person" and dice.random() < 0.95:
            item.age_years = dice.choice((17, 18, 30, 45, 60, 62, 63, 64, 65, 70))
        if kind == "person" and dice.random() < 0.8:
            item.declaration.monthly_income_fen = facts["declared.monthly_income_fen"]
        if dice.random() < 0.1:
            item.as_of_time.FromDatetime(NOW - dt.timedelta(days=1000))
        yield item


async def priced() -> PriceApplicationsResponse:
    items = [item for kind in PARTIES for item in priced_items(kind)]
    servicer = PricingServicer(load_policy("cn-demo-2026-11"), FakeClock())
    return await servicer.PriceApplications(PriceApplicationsRequest(items=items), CONTEXT)


async def test_no_decision_has_changed() -> None:
    results = (await priced()).results
    outcomes = {result.pricing.outcome for result in results}
    assert outcomes >= set(Pricing.Outcome.values()) - {Pricing.OUTCOME_UNSPECIFIED}
    assert digest(results) == PRICED


async def test_a_decision_is_the_same_in_a_batch_and_alone() -> None:
    servicer = PricingServicer(load_policy("cn-demo-2026-11"), FakeClock())
    items = list(priced_items("person"))[:64]
    together = await servicer.PriceApplications(PriceApplicationsRequest(items=items), CONTEXT)
    for item, result in zip(items, together.results, strict=True):
        (alone,) = (await servicer.PriceApplications(PriceApplicationsRequest(items=[item]), CONTEXT)).results
        assert alone == result


async def scored() -> scoring.ScoreProfilesResponse:
    dice = random.Random(1)
    items = [
        scoring.ScoreProfilesRequest.Item(key=str(index), party_kind=party, profile=profile_of(dice, kind, index))
        for kind, party in PARTIES.items()
        for index in range(CASES // 2)
    ]
    models = {Party.KIND_PERSON: load_model("consumer-2026-11"), Party.KIND_FIRM: load_model("firm-2026-11")}
    servicer = ScoringServicer(models, FakeClock())
    together = await servicer.ScoreProfiles(scoring.ScoreProfilesRequest(items=items), CONTEXT)
    for item, result in zip(items[:64], together.results, strict=False):
        (alone,) = (await servicer.ScoreProfiles(scoring.ScoreProfilesRequest(items=[item]), CONTEXT)).results
        # Bit for bit: a replay scores one by one what was scored in a batch.
        assert alone == result
    return together


async def test_no_score_has_changed() -> None:
    results = (await scored()).results
    assert {result.WhichOneof("outcome") for result in results} == {"score", "error"}
    for result in results:
        # The last bits of a logarithm are the platform's.
        result.score.pd = round(result.score.pd, 12)
        for factor in result.score.factors:
            factor.contribution = round(factor.contribution, 12)
    assert digest(results) == SCORED


def digest(results: Any) -> str:
    """SHA-256 of all results."""
    return hashlib.sha256(b"".join(one.SerializeToString(deterministic=True) for one in results)).hexdigest()
