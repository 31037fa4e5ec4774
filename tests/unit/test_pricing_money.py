"""Schedules, rates and limits: exact to the fen, adding up, and within every cap."""

import math
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis.strategies import floats, integers, sampled_from
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.type.v1.reason_pb2 import Reason

from services.pricing.decide import price
from services.pricing.policy import load_policy
from services.pricing.rate import build_rate, yearly_pd
from services.pricing.schedule import effective_ppm, level_payment_fen, schedule
from tests.builders import NOW
from tests.unit.test_pricing_outcome import a_firm, a_person

POLICY = load_policy("cn-demo-2026-11")
FIRM, PERSON = POLICY.products["firm_working_capital"], POLICY.products["consumer_instalment"]


@given(integers(100, 10_000_000_000), integers(0, 360_000), integers(1, 360))
def test_every_loan_is_repaid_exactly_and_no_balance_grows(principal_fen: int, apr_ppm: int, term: int) -> None:
    rows = schedule(principal_fen, apr_ppm, term)
    balances = [principal_fen, *(row.balance_fen for row in rows)]
    assert len(rows) == term
    assert balances[-1] == 0
    assert sum(row.principal_fen for row in rows) == principal_fen
    assert all(before >= after >= 0 for before, after in pairwise(balances))
    assert all(row.payment_fen == row.principal_fen + row.interest_fen for row in rows)


@given(integers(100_000, 10_000_000_000), integers(0, 360_000), integers(1, 60))
def test_the_level_amount_is_the_annuity_rounded_half_up(principal_fen: int, apr_ppm: int, term: int) -> None:
    rate = Decimal(apr_ppm) / 12_000_000
    exact = principal_fen * rate / (1 - (1 + rate) ** -term) if rate else Decimal(principal_fen) / term
    assert abs(level_payment_fen(principal_fen, apr_ppm, term) - exact) <= Decimal("0.5001")


@given(integers(1_000_000, 1_000_000_000), integers(1_000, 360_000), integers(2, 60))
def test_the_effective_rate_is_where_the_present_value_is_the_principal(
    principal_fen: int, apr: int, term: int
) -> None:
    payments = [row.payment_fen for row in schedule(principal_fen, apr, term)]
    told = effective_ppm(principal_fen, payments)

    def worth(yearly: float) -> float:
        return math.fsum(paid * math.exp(-month / 12 * math.log1p(yearly)) for month, paid in enumerate(payments, 1))

    assert worth((told + 1) / 1e6) <= principal_fen <= worth((told - 1) / 1e6)


@pytest.mark.parametrize(("principal_fen", "apr_ppm", "term"), [(0, 1, 1), (1, -1, 1), (1, 1, 0), (1, 1, 361)])
def test_terms_that_no_loan_has_are_refused(principal_fen: int, apr_ppm: int, term: int) -> None:
    with pytest.raises(ValueError, match="term 1 to 360"):
        schedule(principal_fen, apr_ppm, term)


@given(floats(1e-6, 0.999999), sampled_from([FIRM, PERSON]), integers(1, 400_000))
def test_lines_add_up_and_the_law_goes_before_the_product(pd: float, product: object, most: int) -> None:
    rate = build_rate(pd, product, POLICY.market, most)  # type: ignore[arg-type]
    assert sum(line.rate_ppm for line in rate.components) == rate.apr_ppm <= most
    names = [line.name for line in rate.components]
    assert names[:5] == ["funding", "expected_loss", "operating_cost", "capital", "margin"]
    assert names[5:] in ([], ["market_bound"])


def test_a_pd_of_two_years_is_a_smaller_one_of_one() -> None:
    assert yearly_pd(0.19, 24) == pytest.approx(Decimal("0.1"))
    assert yearly_pd(0.19, 12) == Decimal("0.19")


@settings(max_examples=200, deadline=None)
@given(integers(100_000, 30_000_000), integers(1, 60), floats(0.0005, 0.24), sampled_from("ABCD"),
       integers(0, 5_000_000), integers(0, 1_000_000))  # fmt: skip
def test_no_offer_goes_beyond_what_a_person_asked_can_carry_or_the_law_allows(
    amount: int, term: int, pd: float, grade: str, income: int, existing: int
) -> None:
    item = a_person(amount, term, pd, grade, income, credit__monthly_payment_fen=existing)
    result = price(item, POLICY, NOW)
    share = PERSON.payment_share[grade]
    for offer in result.offers:
        assert offer.principal_fen <= min(amount, 20_000_000)
        assert PERSON.amount_fen.min <= offer.principal_fen
        assert PERSON.term_months.min <= offer.term_months <= PERSON.term_months.max
        assert offer.instalment_fen <= income * share - existing + 1
        assert offer.irr_ppm <= 240_000
        assert sum(line.rate_ppm for line in offer.rate_components) == offer.apr_ppm
        paid = offer.instalment_fen * (offer.term_months - 1) + offer.last_instalment_fen
        assert paid - offer.principal_fen == offer.total_interest_fen
    as_asked = bool(result.offers) and (result.offers[0].principal_fen, result.offers[0].term_months) == (amount, term)
    assert (result.outcome == Pricing.OUTCOME_APPROVED) == as_asked


@settings(max_examples=200, deadline=None)
@given(integers(100, 150_000_000), integers(1, 24), floats(0.0005, 0.18), integers(-(10**9), 10**10))
def test_a_firm_borrows_within_its_turnover(amount: int, term: int, pd: float, sales: int) -> None:
    result = price(a_firm(amount, term, pd, "B", tax__sales_12m_fen=sales), POLICY, NOW)
    for offer in result.offers:
        assert 10_000_000 <= offer.principal_fen <= min(amount, 100_000_000, sales // 5)
    if not result.offers:
        assert result.outcome == Pricing.OUTCOME_DECLINED
        assert result.reasons[0].code == "LIMIT_BELOW_MINIMUM"


@given(floats(0.001, 0.1), floats(0.001, 0.1))
def test_more_risk_never_costs_less(one: float, other: float) -> None:
    assume(one < other)
    low, high = (price(a_firm(pd=pd, grade="B"), POLICY, NOW).offers[0].apr_ppm for pd in (one, other))
    assert low <= high


def test_nothing_but_risk_and_cost_sets_the_price() -> None:
    """Two people of the same risk pay the same, whatever their age and income (PIPL 24)."""
    prices = {
        price(a_person(1_000_000, 12, 0.05, "B", income, age=age), POLICY, NOW).offers[0].apr_ppm
        for income in (1_000_000, 9_000_000)
        for age in (19, 40, 63)
    }
    assert len(prices) == 1


def test_a_person_whose_income_binds_is_shown_the_shortest_term_that_carries_the_loan() -> None:
    result = price(a_person(5_000_000, 12, 0.03, "B", 700_000), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_COUNTER_OFFER
    first, second = result.offers
    assert (first.term_months, second.term_months, second.principal_fen) == (12, 18, 5_000_000)
    assert first.principal_fen < 5_000_000
    assert [r.code for r in result.reasons if r.effect == Reason.EFFECT_REDUCE] == ["LIMIT_INCOME"]


def test_no_longer_term_is_offered_that_age_would_forbid() -> None:
    result = price(a_person(5_000_000, 12, 0.03, "B", 500_000, age=64), POLICY, NOW)
    assert result.offers
    assert max(offer.term_months for offer in result.offers) < 24


def test_a_term_that_the_product_does_not_have_is_countered() -> None:
    result = price(a_person(1_000_000, 60, 0.03, "A", 5_000_000), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_COUNTER_OFFER
    assert result.offers[0].term_months == 36
    assert "TERM_OF_PRODUCT" in [r.code for r in result.reasons]


def test_the_text_of_a_bound_states_its_amount() -> None:
    result = price(a_firm(90_000_000, grade="A", tax__sales_12m_fen=200_000_000), POLICY, NOW)
    assert result.reasons[0].text_zh == "额度不超过近一年开票销售额的25%（等级A），即500,000元"
    assert result.reasons[0].text_en == "at most 25% of a year's invoiced sales is lent (grade A), which is 500,000 CNY"


def test_a_bound_shows_what_was_asked_against_it_and_what_it_rests_on() -> None:
    result = price(a_firm(90_000_000, grade="A", tax__sales_12m_fen=200_000_000), POLICY, NOW)
    asked, sales, share = result.reasons[0].facts
    assert (asked.attribute, asked.value.integer, asked.condition) == ("request.amount_fen", 90_000_000, "<= 50000000")
    assert (sales.attribute, sales.value.integer, sales.source) == ("tax.sales_12m_fen", 200_000_000, "tax")
    assert (share.attribute, share.value.number, share.source) == ("policy.turnover_share", 0.25, "policy")


def test_every_limit_says_what_of_policy_it_rests_on() -> None:
    told = [
        *price(a_firm(200_000_000, grade="A", tax__sales_12m_fen=2_000_000_000), POLICY, NOW).reasons,
        *price(a_person(1_000_000, 60, 0.03, "A", 5_000_000), POLICY, NOW).reasons,
        *price(a_person(28_000_000, 12, 0.03, "A", 90_000_000), POLICY, NOW).reasons,
        *price(a_person(5_000_000, 12, 0.03, "B", 1_000), POLICY, NOW).reasons,
    ]
    limits = {reason.code: reason for reason in told if reason.kind == Reason.KIND_LIMIT}
    assert {"LIMIT_PRODUCT", "TERM_OF_PRODUCT", "CAP_CONSUMER_INTERNET", "LIMIT_INCOME", "LIMIT_BELOW_MINIMUM"} <= set(
        limits
    )
    for reason in limits.values():
        assert reason.facts[0].condition, reason.code
        assert any(fact.source == "policy" for fact in reason.facts), reason.code


def test_an_age_comes_from_the_identity_document() -> None:
    result = price(a_person(5_000_000, 12, 0.03, "B", 500_000, age=70), POLICY, NOW)
    assert {fact.source for reason in result.reasons if "AGE" in reason.code for fact in reason.facts} == {"identity"}
