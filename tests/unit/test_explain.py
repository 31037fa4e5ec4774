"""Decisions in words, as the borrower reads them: one language each, and nothing said that is not so."""

from __future__ import annotations

import re

import pytest
from lending.intake.v1.intake_service_pb2 import Decision
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.reason_pb2 import Fact, Reason, Value

from services.intake.dictionary import labels
from services.intake.explain import explain
from services.pricing.policy import load_policy

LOAN = LoanRequest(amount_fen=340_000, term_months=6)
LABELS = labels()
POLICY = load_policy("cn-demo-2026-11")


def told(attribute: str, value: Value | None, effect: Reason.Effect.ValueType = Reason.EFFECT_FAVOURABLE) -> Reason:
    """A factor of the score, with its texts."""
    fact = Fact(attribute=attribute, value=value, source=attribute.split(".")[0])
    reason = Reason(kind=Reason.KIND_SCORE_FACTOR, effect=effect, contribution=-0.1, facts=[fact])
    decision = Decision(outcome=Decision.OUTCOME_DECLINED, reasons=[reason])
    explain(decision, LOAN, LABELS)
    return decision.reasons[0]


def a_decision(outcome: Decision.Outcome.ValueType, *reasons: Reason, offered_fen: int = 0) -> Decision:
    decision = Decision(outcome=outcome, reasons=reasons)
    if offered_fen:
        decision.offers.add(
            principal_fen=offered_fen, term_months=6, apr_ppm=94_000, irr_ppm=98_100, instalment_fen=53_092
        )
    return decision


@pytest.mark.parametrize(
    ("attribute", "value", "zh", "en"),
    [
        ("credit.monthly_payment_fen", Value(integer=123_456), "1,234.56元", "1,234.56 CNY"),
        ("credit.monthly_payment_fen", Value(integer=123_400), "1,234元", "1,234 CNY"),
        ("court.is_dishonest_debtor", Value(flag=True), "：是（", ": yes ("),
        ("court.is_dishonest_debtor", Value(flag=False), "：否（", ": no ("),
        ("credit.debt_ratio", Value(number=0.185), "18.5%", "18.5%"),
        ("tax.sales_invoices_per_month", Value(number=50.83), "50.8", "50.8"),
        ("tax.sales_volatility", Value(number=0.893), "0.89", "0.89"),
    ],
)
def test_values_are_told_in_one_language_each(attribute: str, value: Value, zh: str, en: str) -> None:
    reason = told(attribute, value)
    assert zh in reason.text_zh
    assert en in reason.text_en
    assert not re.search("[A-Za-z]", reason.text_zh)
    assert reason.text_en.isascii()


def test_a_fact_that_nobody_states_moved_nothing() -> None:
    reason = told("credit.debt_ratio", None)
    assert reason.text_zh == "月还款占月收入比例：无记录（央行征信），评分按无记录处理"
    assert reason.text_en.startswith("monthly debt payments over monthly income: no record")
    assert "lowered" not in reason.text_en


@pytest.mark.parametrize(
    ("effect", "zh", "en"), [(Reason.EFFECT_ADVERSE, "上升", "raised"), (Reason.EFFECT_FAVOURABLE, "下降", "lowered")]
)
def test_what_a_fact_did_to_the_risk_is_told(effect: Reason.Effect.ValueType, zh: str, en: str) -> None:
    reason = told("credit.open_lines", Value(integer=0), effect)
    assert reason.text_zh.endswith(f"使评估的违约风险{zh}")
    assert en in reason.text_en


def test_the_rest_of_the_factors_is_told_in_one_line() -> None:
    decision = Decision(reasons=[Reason(kind=Reason.KIND_SCORE_FACTOR, effect=Reason.EFFECT_ADVERSE, contribution=0.1)])
    explain(decision, LOAN, LABELS)
    assert decision.reasons[0].text_en == "all other factors together raised the estimated risk of default"


def test_an_approval_names_its_offer() -> None:
    zh, en = explain(a_decision(Decision.OUTCOME_APPROVED, offered_fen=340_000), LOAN, LABELS)
    assert zh == (
        "您的申请已按所申请的金额和期限批准：贷款3,400元，分6期按月偿还，年利率9.40%（综合年化9.81%），每期还款530.92元。"
    )
    assert en == (
        "Your application is approved as asked: 3,400 CNY over 6 months at 9.40% a year (9.81% all-in),"
        " 530.92 CNY a month."
    )


def test_a_counter_offer_names_what_was_asked_what_is_offered_and_why() -> None:
    reason = Reason(effect=Reason.EFFECT_REDUCE, text_zh="额度不足", text_en="the limit is lower")
    decision = a_decision(Decision.OUTCOME_COUNTER_OFFER, reason, offered_fen=310_000)
    zh, en = explain(decision, LOAN, LABELS)
    assert zh.startswith("您申请贷款3,400元、期限6个月；我们可以提供：贷款3,100元")
    assert zh.endswith("原因：额度不足。")
    assert en.endswith("Reason: the limit is lower.")


def test_a_decline_tells_its_main_reasons_and_no_more_than_four() -> None:
    reasons = [Reason(effect=Reason.EFFECT_DECLINE, text_zh=f"原因{n}", text_en=f"reason {n}") for n in range(6)]
    zh, en = explain(a_decision(Decision.OUTCOME_DECLINED, *reasons), LOAN, LABELS)
    assert zh == "很遗憾，您的贷款申请（3,400元、期限6个月）本次未能批准。原因：原因0；原因1；原因2；原因3。"
    assert en.endswith("Reasons: reason 0; reason 1; reason 2; reason 3.")


def test_no_text_of_policy_mixes_languages() -> None:
    texts = [(code, text.zh, text.en) for code, text in POLICY.texts.items()]
    texts += [(c.rule.code, c.rule.zh, c.rule.en) for c in POLICY.rules]
    texts += [(cap.code, cap.zh, cap.en) for cap in POLICY.caps]
    for code, zh, en in texts:
        assert not re.search(r"[A-Za-z]", re.sub(r"\{[^}]*\}", "", zh)), code
        assert en.isascii(), code
