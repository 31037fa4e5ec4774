"""A decision in words, Chinese and English, from what was stored with it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lending.intake.v1.intake_service_pb2 import Decision
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.offer_pb2 import Offer
from lending.type.v1.reason_pb2 import Fact, Reason

MAIN_REASONS = 4
"""A person is told at most four main reasons; the others stand below (Reg B's commentary uses the same figure)."""


@dataclass(frozen=True)
class Label:
    """What an attribute and its source are called."""

    zh: str
    en: str
    unit: str
    source_zh: str
    source_en: str


def explain(decision: Decision, loan: LoanRequest, labels: Mapping[str, Label]) -> tuple[str, str]:
    """Fill in the texts of reasons that have none, and sum up: (summary_zh, summary_en)."""
    for reason in decision.reasons:
        if not reason.text_zh:
            reason.text_zh, reason.text_en = _texts(reason, labels)
    asked_zh = f"{_money(loan.amount_fen)}元、期限{loan.term_months}个月"
    asked_en = f"{_money(loan.amount_fen)} CNY over {loan.term_months} months"
    best = decision.offers[0] if decision.offers else None
    if decision.outcome == Decision.OUTCOME_APPROVED and best:
        return (
            f"您的申请已按所申请的金额和期限批准：{_zh(best)}。",
            f"Your application is approved as asked: {_en(best)}.",
        )
    if best:
        why_zh, why_en = _main(decision, Reason.EFFECT_REDUCE)
        return (
            f"您申请贷款{asked_zh}；我们可以提供：{_zh(best)}。{why_zh}",
            f"You asked for {asked_en}; we can offer {_en(best)}. {why_en}",
        )
    why_zh, why_en = _main(decision, Reason.EFFECT_DECLINE)
    return (
        f"很遗憾，您的贷款申请（{asked_zh}）本次未能批准。{why_zh}",
        f"We are sorry: your application for {asked_en} was not approved this time. {why_en}",
    )


def _main(decision: Decision, effect: Reason.Effect.ValueType) -> tuple[str, str]:
    """The main reasons of one effect as a sentence; empty where there is none."""
    reasons = [r for r in decision.reasons if r.effect == effect][:MAIN_REASONS]
    if not reasons:
        return "", ""
    word = "Reason" if len(reasons) == 1 else "Reasons"
    return f"原因：{'；'.join(r.text_zh for r in reasons)}。", f"{word}: {'; '.join(r.text_en for r in reasons)}."


def _zh(offer: Offer) -> str:
    return (
        f"贷款{_money(offer.principal_fen)}元，分{offer.term_months}期按月偿还，年利率{offer.apr_ppm / 1e4:.2f}%"
        f"（综合年化{offer.irr_ppm / 1e4:.2f}%），每期还款{_money(offer.instalment_fen)}元"
    )


def _en(offer: Offer) -> str:
    return (
        f"{_money(offer.principal_fen)} CNY over {offer.term_months} months at {offer.apr_ppm / 1e4:.2f}% a year"
        f" ({offer.irr_ppm / 1e4:.2f}% all-in), {_money(offer.instalment_fen)} CNY a month"
    )


def _money(fen: int) -> str:
    """CNY, whole where there are no fen."""
    return f"{fen // 100:,}" if fen % 100 == 0 else f"{fen / 100:,.2f}"


def _texts(reason: Reason, labels: Mapping[str, Label]) -> tuple[str, str]:
    """A factor of the score: what was known, and which way it moved the estimate."""
    raised = reason.effect == Reason.EFFECT_ADVERSE
    way_zh, way_en = ("上升", "raised") if raised else ("下降", "lowered")
    if not reason.facts:
        return (
            f"其余因素合计使评估的违约风险{way_zh}",
            f"all other factors together {way_en} the estimated risk of default",
        )
    told = [_fact(fact, labels) for fact in reason.facts]
    what_zh, what_en = "、".join(zh for zh, _ in told), ", ".join(en for _, en in told)
    if reason.effect not in (Reason.EFFECT_ADVERSE, Reason.EFFECT_FAVOURABLE):
        return what_zh, what_en
    if not any(fact.value.WhichOneof("kind") for fact in reason.facts):
        # A fact that is not there moved nothing; what the model expects of those without it did.
        return f"{what_zh}，评分按无记录处理", f"{what_en}; the score treats it as unknown"
    return f"{what_zh}，使评估的违约风险{way_zh}", f"{what_en}, which {way_en} the estimated risk of default"


def _fact(fact: Fact, labels: Mapping[str, Label]) -> tuple[str, str]:
    label = labels.get(fact.attribute, Label(fact.attribute, fact.attribute, "", fact.source, fact.source))
    value_zh, value_en = _value(fact, label.unit)
    on = fact.observed_time.ToDatetime().date().isoformat() if fact.HasField("observed_time") else ""
    source_zh, source_en = (
        (label.source_zh, label.source_en) if not on else (f"{label.source_zh}，{on}", f"{label.source_en}, {on}")
    )
    return f"{label.zh}：{value_zh}（{source_zh}）", f"{label.en}: {value_en} ({source_en})"


def _value(fact: Fact, unit: str) -> tuple[str, str]:
    """The value in Chinese and in English."""
    value = fact.value
    match value.WhichOneof("kind"):
        case "integer" if unit == "fen":
            return f"{_money(value.integer)}元", f"{_money(value.integer)} CNY"
        case "integer":
            text = str(value.integer)
        case "number" if unit == "fraction":
            text = f"{value.number:.1%}"
        case "number" if unit == "count":
            text = f"{value.number:.1f}"
        case "number":
            text = f"{value.number:.2f}"
        case "flag":
            return ("是", "yes") if value.flag else ("否", "no")
        case "text":
            text = value.text
        case _:
            return "无记录", "no record"
    return text, text
