"""How much: every bound is computed, the lowest binds, and all are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_FLOOR, Decimal

from services.pricing.evidence import Evidence
from services.pricing.policy import Product, Rule

STEP_FEN = 100_00
"""Amounts on offer that are not what was asked are whole hundreds of CNY, rounded down."""
_INCOMES = ("declared.monthly_income_fen", "tax.annual_income_fen", "bank.monthly_inflow_fen")
"""Who states an income; the annual one counts a twelfth."""


@dataclass(frozen=True)
class Bound:
    """One bound on the amount, fen, and what it was computed from. `says` fills the text of its code.

    settings  the figures of policy behind it, by name: fen or a share.
    """

    code: str
    amount_fen: int
    facts: tuple[str, ...] = ()
    says: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, int | float] = field(default_factory=dict)
    rule: Rule | None = None


def bounds(
    product: Product,
    grade: str,
    term_months: int,
    apr_ppm: int,
    known: Evidence,
    cap: Rule | None,
    evidence_share: Decimal | None,
) -> list[Bound]:
    """All bounds, lowest first, without what was asked for. A fact that nobody states bounds at zero and says so.

    `evidence_share` is what is left of the limit where policy does without a source; None on full evidence.
    """
    most = product.amount_fen.max
    found = [Bound("LIMIT_PRODUCT", most, settings={"policy.amount_fen_max": most})]
    if cap:
        found.append(Bound(cap.code, cap.value, settings={f"policy.{cap.id or cap.code}": cap.value}, rule=cap))
    if product.turnover_share:
        found.append(_turnover(product, grade, known))
    if product.payment_share:
        found.append(_affordable(product, grade, term_months, apr_ppm, known))
    found.sort(key=lambda bound: bound.amount_fen)
    if evidence_share is not None:
        left = _down(found[0].amount_fen * evidence_share)
        settings = {"policy.evidence_share": float(evidence_share)}
        found.insert(0, Bound("LIMIT_PARTIAL_EVIDENCE", left, (), {"share": f"{evidence_share:.0%}"}, settings))
    return found


def _turnover(product: Product, grade: str, known: Evidence) -> Bound:
    fact = "tax.sales_12m_fen"
    sales = known.integer(fact)
    if sales is None:
        return Bound("LIMIT_TURNOVER_UNKNOWN", 0, (fact,))
    share = product.turnover_share[grade]
    says, settings = {"share": f"{share:.0%}", "grade": grade}, {"policy.turnover_share": float(share)}
    return Bound("LIMIT_TURNOVER", _down(sales * share), (fact,), says, settings)


def _affordable(product: Product, grade: str, term_months: int, apr_ppm: int, known: Evidence) -> Bound:
    """What the income can repay: the lowest income anybody states, less what existing debt already takes."""
    stated = {name: value for name in _INCOMES if (value := known.integer(name)) is not None}
    if not stated:
        return Bound("LIMIT_INCOME_UNKNOWN", 0, _INCOMES[:1])
    monthly = {name: value // 12 if name == "tax.annual_income_fen" else value for name, value in stated.items()}
    source = min(monthly, key=lambda name: monthly[name])
    share = product.payment_share[grade]
    # The register knows of no debt: nothing is paid on any.
    existing = known.integer("credit.monthly_payment_fen") or 0
    free = max(Decimal(0), monthly[source] * share - existing)
    rate = Decimal(apr_ppm) / 12_000_000
    worth = free * (1 - (1 + rate) ** -term_months) / rate if rate else free * term_months
    facts = (source, "credit.monthly_payment_fen")
    says = {"share": f"{share:.0%}", "grade": grade, "term": str(term_months)}
    return Bound("LIMIT_INCOME", _down(worth), facts, says, {"policy.payment_share": float(share)})


def _down(amount: Decimal) -> int:
    """Whole steps, never below zero: refunds can leave a year's sales negative."""
    return max(0, int((amount / STEP_FEN).to_integral_value(ROUND_FLOOR)) * STEP_FEN)
