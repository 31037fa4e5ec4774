"""Outcomes: declined only on complete evidence in date, never by silence; the RPCs as callers see them."""

import datetime as dt
from collections.abc import Mapping
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans, fixed_dictionaries, sampled_from
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1 import pricing_service_pb2 as pb
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.loan_pb2 import Declaration, LoanRequest
from lending.type.v1.party_pb2 import Party
from lending.type.v1.reason_pb2 import Reason

from lab.population import SOURCES
from loanmesh.runtime.clock import FakeClock
from services.pricing.decide import price
from services.pricing.policy import load_policy
from services.pricing.servicer import PricingServicer
from tests.builders import NOW, a_profile

States = Mapping[str, SourceReport.State.ValueType]
_SOUND = {"court__enforcement_open_count": 0, "court__is_dishonest_debtor": False, "credit__current_overdue_fen": 0,
          "credit__overdue_90_count": 0}  # fmt: skip
_SOUND_FIRM = {**_SOUND, "registry__is_active": True, "tax__sales_12m_fen": 5_000_000_000, "tax__months_active": 36,
               "tax__months_without_sales_12m": 0}  # fmt: skip


def a_firm(
    amount_fen: int = 50_000_000,
    term: int = 12,
    pd: float = 0.02,
    grade: str = "A",
    states: States | None = None,
    **facts: object,
) -> pb.PriceApplicationsRequest.Item:
    """A firm asks for 500,000 CNY over a year."""
    return pb.PriceApplicationsRequest.Item(
        key="lenders/demo/applications/1/assessments/1",
        lender="lenders/demo",
        party_kind=Party.KIND_FIRM,
        loan=LoanRequest(amount_fen=amount_fen, term_months=term, purpose="库存"),
        profile=a_profile("firm", 1, states, NOW, **{**_SOUND_FIRM, **facts}),
        score=Score(pd=pd, grade=grade),
    )


def a_person(
    amount_fen: int = 1_000_000,
    term: int = 12,
    pd: float = 0.02,
    grade: str = "A",
    income_fen: int | None = 2_000_000,
    age: int | None = 35,
    states: States | None = None,
    **facts: object,
) -> pb.PriceApplicationsRequest.Item:
    """A person with an income of 20,000 CNY a month and no debts asks for 10,000 CNY over a year."""
    income = (
        {}
        if income_fen is None
        else {"tax__annual_income_fen": income_fen * 12, "bank__monthly_inflow_fen": income_fen}
    )
    sound = {**_SOUND, "credit__monthly_payment_fen": 0, **income, **facts}
    item = pb.PriceApplicationsRequest.Item(
        key="lenders/demo/applications/2/assessments/1",
        lender="lenders/demo",
        party_kind=Party.KIND_PERSON,
        loan=LoanRequest(amount_fen=amount_fen, term_months=term, purpose="装修房屋"),
        profile=a_profile("person", 1, states, NOW, **sound),
        score=Score(pd=pd, grade=grade),
    )
    if income_fen is not None:
        item.declaration.CopyFrom(Declaration(monthly_income_fen=income_fen))
    if age is not None:
        item.age_years = age
    return item


POLICY = load_policy("cn-demo-2026-11")
FRESH, STALE, MISSING = SourceReport.STATE_FRESH, SourceReport.STATE_STALE, SourceReport.STATE_MISSING
NO_CONSENT, NOT_FOUND = SourceReport.STATE_NO_CONSENT, SourceReport.STATE_NOT_FOUND
ANY_STATES = fixed_dictionaries(
    {source: sampled_from([FRESH, FRESH, STALE, MISSING, NO_CONSENT, NOT_FOUND]) for source in SOURCES}
)
FAULTS: list[dict[str, Any]] = [{}, {"court__is_dishonest_debtor": True}, {"credit__current_overdue_fen": 5_000},
                                {"credit__overdue_90_count": 4}, {"pd": 0.9, "grade": "E"}]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(ANY_STATES, sampled_from(FAULTS), sampled_from([50_000, 20_000_000, 50_000_000]), booleans())
def test_no_decline_while_a_source_is_silent_old_or_unasked(
    states: States, fault: dict[str, Any], amount: int, person: bool
) -> None:
    item = (a_person if person else a_firm)(amount, states=states, **fault)
    result = price(item, POLICY, NOW)
    silent = {source for source, state in states.items() if state in (MISSING, NO_CONSENT)}
    if result.outcome == Pricing.OUTCOME_DECLINED:
        assert set(states.values()) <= {FRESH, NOT_FOUND}
    elif result.outcome == Pricing.OUTCOME_UNDETERMINED:
        assert result.missing_sources
        assert not result.offers
        assert not [r for r in result.reasons if r.effect == Reason.EFFECT_DECLINE]
    else:
        assert silent <= ({"bank_flow"} if person or amount > 30_000_000 else {"bank_flow", "registry"})
        assert list(result.degradations) == [f"without_{source}" for source in sorted(silent)]
        waived = [r.code for r in result.reasons if r.effect == Reason.EFFECT_WAIVED]
        assert waived == [f"WITHOUT_{source.upper()}" for source in sorted(silent)]
    assert all(r.text_zh and r.text_en and "{" not in r.text_zh + r.text_en for r in result.reasons)


def test_a_fresh_answer_past_its_date_carries_no_decline_but_an_approval() -> None:
    late = NOW + dt.timedelta(days=1)
    assert price(a_firm(), POLICY, late).outcome == Pricing.OUTCOME_APPROVED
    assert price(a_firm(court__is_dishonest_debtor=True), POLICY, late).outcome == Pricing.OUTCOME_UNDETERMINED


def test_a_small_firm_may_do_without_the_registry_and_a_large_loan_may_not() -> None:
    small = price(a_firm(30_000_000, states={"registry": MISSING}), POLICY, NOW)
    assert small.outcome == Pricing.OUTCOME_APPROVED
    waived = next(r for r in small.reasons if r.effect == Reason.EFFECT_WAIVED)
    assert [fact.attribute for fact in waived.facts] == ["registry.is_active"]
    large = price(a_firm(30_000_100, states={"registry": MISSING}), POLICY, NOW)
    assert (large.outcome, list(large.missing_sources)) == (Pricing.OUTCOME_UNDETERMINED, ["registry"])


def test_a_fact_of_the_wrong_kind_is_no_answer() -> None:
    result = price(a_firm(court__enforcement_open_count="many"), POLICY, NOW)
    assert (result.outcome, list(result.missing_sources)) == (Pricing.OUTCOME_UNDETERMINED, ["court"])


def test_a_fact_that_another_source_states_does_not_count() -> None:
    item = a_firm(states={"court": MISSING})
    stray = next(r for r in item.profile.reports if r.source == "tax").attributes.add(name="court.is_dishonest_debtor")
    stray.value.flag = False
    assert price(item, POLICY, NOW).outcome == Pricing.OUTCOME_UNDETERMINED


def test_an_age_that_is_not_stated_is_waited_for_not_passed() -> None:
    result = price(a_person(age=None), POLICY, NOW)
    assert (result.outcome, list(result.missing_sources)) == (Pricing.OUTCOME_UNDETERMINED, ["identity"])


@pytest.mark.parametrize(
    ("age", "term", "code"),
    [(17, 12, "APPLICANT_TOO_YOUNG"), (66, 3, "AGE_AT_END_OF_TERM"), (70, 3, "AGE_AT_END_OF_TERM")],
)  # fmt: skip
def test_age_declines(age: int, term: int, code: str) -> None:
    result = price(a_person(term=term, age=age), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_DECLINED
    assert [r.code for r in result.reasons if r.effect == Reason.EFFECT_DECLINE] == [code]


def test_who_would_be_too_old_at_the_end_is_offered_the_longest_term_that_ends_in_time() -> None:
    result = price(a_person(term=24, age=64), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_COUNTER_OFFER
    assert [offer.term_months for offer in result.offers] == [23]
    about_age = [(r.effect, r.facts[0].value.integer) for r in result.reasons if r.code == "AGE_AT_END_OF_TERM"]
    assert about_age == [(Reason.EFFECT_REDUCE, 66)]


@pytest.mark.parametrize("kind", [LoanRequest.PURPOSE_KIND_HOME_PURCHASE, LoanRequest.PURPOSE_KIND_SECURITIES])
def test_a_barred_purpose_declines_with_its_law(kind: LoanRequest.PurposeKind.ValueType) -> None:
    item = a_person()
    item.loan.purpose_kind = kind
    result = price(item, POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_DECLINED
    assert (result.reasons[0].code, result.reasons[0].authority) == ("PURPOSE_BARRED", "银保监会令2020年第9号")


def test_a_loan_below_the_least_amount_says_so_and_what_bound_it() -> None:
    result = price(a_firm(tax__sales_12m_fen=20_000_000), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_DECLINED
    told = [r.code for r in result.reasons if r.effect == Reason.EFFECT_DECLINE]
    assert told == ["LIMIT_BELOW_MINIMUM", "LIMIT_TURNOVER"]


def test_a_rule_is_told_with_fact_source_value_and_condition() -> None:
    reason = price(a_firm(credit__current_overdue_fen=1_234_500), POLICY, NOW).reasons[0]
    assert (reason.code, reason.text_zh) == ("OVERDUE_NOW", "当前有逾期欠款12,345元")
    fact = reason.facts[0]
    assert (fact.source, fact.value.integer, fact.condition) == ("central_bank", 1_234_500, "<= 0")
    assert fact.HasField("observed_time")


async def _ask(*items: pb.PriceApplicationsRequest.Item) -> pb.PriceApplicationsResponse:
    servicer = PricingServicer(POLICY, FakeClock())
    return await servicer.PriceApplications(pb.PriceApplicationsRequest(items=items), cast(Any, None))


async def test_one_bad_item_costs_the_others_nothing() -> None:
    bad_grade, bad_pd, bad_product = a_firm(grade="F"), a_firm(pd=float("nan")), a_person()
    bad_product.loan.product = "firm_working_capital"
    results = (await _ask(a_firm(), bad_grade, bad_pd, bad_product, a_person())).results
    assert [r.WhichOneof("outcome") for r in results] == ["pricing", "error", "error", "error", "pricing"]
    assert {r.error.code for r in results[1:4]} == {3}
    assert results[0].key == a_firm().key


async def test_a_fault_of_ours_is_internal_and_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(item: object, policy: object, now: object) -> Pricing:
        raise KeyError("张三")

    monkeypatch.setattr("services.pricing.servicer.price", fails)
    error = (await _ask(a_firm())).results[0].error
    assert error.code == 13
    assert "张三" not in str(error)


async def test_the_same_request_has_the_same_answer() -> None:
    assert (await _ask(a_firm(), a_person())) == (await _ask(a_firm(), a_person()))


async def test_schedules_match_the_offer() -> None:
    offer = price(a_firm(), POLICY, NOW).offers[0]
    ask = pb.ScheduleRepaymentsRequest.Item(
        principal_fen=offer.principal_fen, apr_ppm=offer.apr_ppm, term_months=offer.term_months
    )
    servicer = PricingServicer(POLICY, FakeClock())
    answer = await servicer.ScheduleRepayments(pb.ScheduleRepaymentsRequest(items=[ask]), cast(Any, None))
    rows = answer.schedules[0].instalments
    assert {row.payment_fen for row in rows[:-1]} == {offer.instalment_fen}
    assert (rows[-1].payment_fen, rows[-1].balance_fen) == (offer.last_instalment_fen, 0)
    assert sum(row.interest_fen for row in rows) == offer.total_interest_fen
