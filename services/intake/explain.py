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
    asked = f"{loan.amount_fen / 100:,.2f}"
    best = decision.offers[0] if decision.offers else None
    if decision.outcome == Decision.OUTCOME_APPROVED and best:
        return f"申请的{asked}元、{loan.term_months}个月已按申请批准。{_zh(best)}", f"Approved as asked: {_en(best)}"
    if best:
        bound_zh, bound_en = _main(decision, Reason.EFFECT_REDUCE)
        return (
            f"申请{asked}元、{loan.term_months}个月；可提供：{_zh(best)}原因：{bound_zh}",
            f"Asked for {asked} CNY over {loan.term_months} months; on offer: {_en(best)} Because: {bound_en}",
        )
    why_zh, why_en = _main(decision, Reason.EFFECT_DECLINE)
    return f"本次未能批准。原因：{why_zh}", f"Not approved this time. Because: {why_en}"


def _main(decision: Decision, effect: Reason.Effect.ValueType) -> tuple[str, str]:
    reasons = [r for r in decision.reasons if r.effect == effect][:MAIN_REASONS]
    return "；".join(r.text_zh for r in reasons) or "—", "; ".join(r.text_en for r in reasons) or "—"


def _zh(offer: Offer) -> str:
    return (
        f"{offer.principal_fen / 100:,.2f}元，{offer.term_months}期，年利率{offer.apr_ppm / 1e4:.2f}%"
        f"（综合年化{offer.irr_ppm / 1e4:.2f}%），每期{offer.instalment_fen / 100:,.2f}元。"
    )


def _en(offer: Offer) -> str:
    return (
        f"{offer.principal_fen / 100:,.2f} CNY over {offer.term_months} months at {offer.apr_ppm / 1e4:.2f} % a year"
        f" (all-in {offer.irr_ppm / 1e4:.2f} %), {offer.instalment_fen / 100:,.2f} CNY a month."
    )


def _texts(reason: Reason, labels: Mapping[str, Label]) -> tuple[str, str]:
    if not reason.facts:
        way_zh, way_en = ("提高", "raised") if reason.contribution > 0 else ("降低", "lowered")
        return f"其他因素合计{way_zh}了风险评估", f"all other factors together {way_en} the estimated risk"
    parts = [_fact(fact, labels) for fact in reason.facts]
    what_zh, what_en = "、".join(zh for zh, _ in parts), ", ".join(en for _, en in parts)
    way = {
        Reason.EFFECT_ADVERSE: ("，提高了风险评估", " raised the estimated risk"),
        Reason.EFFECT_FAVOURABLE: ("，降低了风险评估", " lowered the estimated risk"),
    }.get(reason.effect, ("", ""))
    return what_zh + way[0], what_en + way[1]


def _fact(fact: Fact, labels: Mapping[str, Label]) -> tuple[str, str]:
    label = labels.get(fact.attribute, Label(fact.attribute, fact.attribute, "", fact.source, fact.source))
    value = _value(fact, label.unit)
    on = fact.observed_time.ToDatetime().date().isoformat() if fact.HasField("observed_time") else ""
    since = f", {on}" if on else ""
    return f"{label.zh}{value}（{label.source_zh}{since}）", f"{label.en} {value} ({label.source_en}{since})"


def _value(fact: Fact, unit: str) -> str:
    match fact.value.WhichOneof("kind"):
        case "integer" if unit == "fen":
            return f"{fact.value.integer / 100:,.2f} CNY"
        case "integer":
            return str(fact.value.integer)
        case "number" if unit == "fraction":
            return f"{fact.value.number:.1%}"
        case "number":
            return f"{fact.value.number:.2f}"
        case "flag":
            return "是/yes" if fact.value.flag else "否/no"
        case "text":
            return fact.value.text
        case _:
            return "—"
