"""Pricing: schedules to the fen, rates that add up, and no decline without complete evidence."""

import datetime as dt
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, sampled_from
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.party_pb2 import Party
from lending.type.v1.reason_pb2 import Reason

from lab.population import SOURCES
from loanmesh.runtime.errors import InvalidRequest
from services.pricing.decide import nominal_most_ppm, price
from services.pricing.policy import PolicyError, load_policy, parse_policy
from services.pricing.rate import build_rate
from services.pricing.schedule import effective_ppm, schedule
from tests.builders import NOW, a_profile

POLICY = load_policy("cn-demo-2026-11")
GOOD = {"registry__is_active": True, "court__enforcement_open_count": 0, "court__is_dishonest_debtor": False,
        "credit__current_overdue_fen": 0, "credit__overdue_90_count": 0, "tax__sales_12m_fen": 5_000_000_000,
        "tax__months_active": 36, "tax__months_without_sales_12m": 0}  # fmt: skip
STATES = (SourceReport.STATE_FRESH, SourceReport.STATE_STALE, SourceReport.STATE_MISSING,
          SourceReport.STATE_NO_CONSENT, SourceReport.STATE_NOT_FOUND)  # fmt: skip


def an_item(
    amount_fen: int = 50_000_000, term: int = 12, pd: float = 0.02, grade: str = "A", **facts: object
) -> PriceApplicationsRequest.Item:
    states = facts.pop("states", None)
    return PriceApplicationsRequest.Item(
        key="k",
        lender="lenders/demo",
        party_kind=Party.KIND_FIRM,
        loan=LoanRequest(amount_fen=amount_fen, term_months=term, purpose="库存"),
        profile=a_profile("firm", 1, states=states, **{**GOOD, **facts}),  # type: ignore[arg-type]
        score=Score(pd=pd, grade=grade),
    )


@given(integers(100_00, 1_000_000_000), integers(0, 360_000), integers(1, 60))
def test_the_schedule_repays_the_loan_exactly(principal_fen: int, apr_ppm: int, term_months: int) -> None:
    rows = schedule(principal_fen, apr_ppm, term_months)
    assert rows[-1].balance_fen == 0
    assert sum(row.principal_fen for row in rows) == principal_fen
    assert all(row.payment_fen == row.principal_fen + row.interest_fen for row in rows)
    assert len({row.payment_fen for row in rows[:-1]}) <= 1


def test_a_known_loan_costs_what_the_textbook_says() -> None:
    # 12 % a year nominal is 12.68 % effective; 100,000 CNY over 12 months cost 8,884.88 a month.
    rows = schedule(10_000_000, 120_000, 12)
    assert rows[0].payment_fen == 888_488
    assert effective_ppm(10_000_000, [row.payment_fen for row in rows]) == pytest.approx(126_825, abs=5)


@given(floats(0.0001, 0.999), sampled_from(["firm_working_capital", "consumer_instalment"]))
def test_the_lines_add_up_and_the_cap_holds(pd: float, product: str) -> None:
    most = nominal_most_ppm(240_000)
    rate = build_rate(pd, POLICY.products[product], POLICY.market, most)
    assert sum(line.rate_ppm for line in rate.components) == rate.apr_ppm
    rows = schedule(1_000_000_00, rate.apr_ppm, 12)
    assert effective_ppm(1_000_000_00, [row.payment_fen for row in rows]) <= 240_010


def test_a_sound_firm_is_approved_as_asked() -> None:
    result = price(an_item(), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_APPROVED
    assert (result.offers[0].principal_fen, result.offers[0].term_months) == (50_000_000, 12)


def test_too_much_asked_is_countered_and_says_what_bound_it() -> None:
    result = price(an_item(amount_fen=90_000_000, tax__sales_12m_fen=200_000_000), POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_COUNTER_OFFER
    assert result.offers[0].principal_fen == 50_000_000
    assert result.reasons[0].code == "LIMIT_TURNOVER"


def test_all_rules_that_fire_are_told_not_only_the_first() -> None:
    result = price(
        an_item(court__is_dishonest_debtor=True, registry__is_active=False, credit__overdue_90_count=2), POLICY, NOW
    )
    codes = {reason.code: reason.effect for reason in result.reasons}
    assert result.outcome == Pricing.OUTCOME_DECLINED
    assert codes["DISHONEST_DEBTOR"] == codes["FIRM_NOT_ACTIVE"] == Reason.EFFECT_DECLINE
    assert codes["OVERDUE_90_REPEATED"] == Reason.EFFECT_NEAR_MISS


@settings(max_examples=300)
@given(*(sampled_from(STATES) for _ in SOURCES), booleans(), floats(0.001, 0.9))
def test_no_decline_without_complete_fresh_evidence(
    a: int, b: int, c: int, d: int, e: int, bad: bool, pd: float
) -> None:
    states = dict(zip(SOURCES, (a, b, c, d, e), strict=True))
    item = an_item(pd=pd, grade="E" if pd > 0.25 else "C", states=states, court__is_dishonest_debtor=bad)
    result = price(item, POLICY, NOW)
    complete = {SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND}
    if not set(states.values()) <= complete:
        assert result.outcome != Pricing.OUTCOME_DECLINED
    gone = {s for s, state in states.items() if state in (SourceReport.STATE_MISSING, SourceReport.STATE_NO_CONSENT)}
    if result.outcome in (Pricing.OUTCOME_APPROVED, Pricing.OUTCOME_COUNTER_OFFER):
        assert gone <= {"bank_flow", "registry"}
        assert {f"without_{s}" for s in gone} == set(result.degradations)
    if result.outcome == Pricing.OUTCOME_UNDETERMINED:
        assert result.missing_sources


def test_an_approval_without_bank_flow_is_smaller_and_says_so() -> None:
    item = an_item(amount_fen=100_000_000, states={"bank_flow": SourceReport.STATE_MISSING})
    result = price(item, POLICY, NOW)
    assert result.outcome == Pricing.OUTCOME_COUNTER_OFFER
    assert result.offers[0].principal_fen == 50_000_000
    assert list(result.degradations) == ["without_bank_flow"]


def test_an_unknown_product_names_the_known_ones() -> None:
    item = an_item()
    item.loan.product = "moon_loan"
    with pytest.raises(InvalidRequest, match="firm_working_capital"):
        price(item, POLICY, NOW)


WRONG_EXAMPLE = """
- {code: X, of: [firm], needs: [court.enforcement_open_count], declines_if: court.enforcement_open_count > 0,
   zh: x, en: x, examples: [{given: {court.enforcement_open_count: 1}, fires: false}]}
"""


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("- {code: X, of: [firm], needs: [tax.moon], declines_if: tax.moon > 1, zh: x, en: x}", "tax.moon"),
        ("- {code: X, of: [firm], needs: [], declines_if: '((', zh: x, en: x}", "X"),
        ("- {code: X, of: [firm], colour: red, zh: x, en: x}", "colour"),
        (WRONG_EXAMPLE, "expected False"),
    ],
)  # fmt: skip
def test_a_wrong_policy_is_refused_with_its_fault(wrong: str, said: str) -> None:
    from importlib import resources

    folder = resources.files("services.pricing") / "policies" / "cn-demo-2026-11"
    texts = {part: (folder / f"{part}.yaml").read_text(encoding="utf-8") for part in ("market", "products", "rules")}
    with pytest.raises(PolicyError, match=said):
        parse_policy("test", {**texts, "rules": wrong})


def test_a_cap_holds_from_its_day() -> None:
    earlier = POLICY.cap("amount_fen", "person", dt.date(2025, 3, 13))
    assert earlier is not None
    assert earlier.value == 20_000_000
    cap = POLICY.cap("amount_fen", "person", dt.date(2025, 3, 14))
    assert cap is not None
    assert cap.value == 30_000_000


def test_the_cutoff_is_where_the_build_up_meets_the_highest_rate() -> None:
    product = POLICY.products["firm_working_capital"]
    rate = build_rate(float(product.pd_max), product, POLICY.market, 10**6)
    cost = sum(line.rate_ppm for line in rate.components if line.name != "market_bound")
    assert Decimal(cost) <= product.apr_max_ppm
