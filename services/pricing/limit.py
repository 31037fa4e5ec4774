"""How much: every bound is computed, the lowest binds, and all are told."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from services.pricing.evidence import Evidence
from services.pricing.policy import Product, Rule
from services.pricing.schedule import monthly_rate

STEP_FEN = 100_00
"""Amounts on offer are whole hundreds of CNY."""


@dataclass(frozen=True)
class Bound:
    """One bound on the amount, fen, and what it was computed from."""

    code: str
    amount_fen: int
    facts: tuple[str, ...]
    zh: str
    en: str
    authority: str = ""


def bounds(
    product: Product, grade: str, term_months: int, apr_ppm: int, known: Evidence, cap: Rule | None
) -> list[Bound]:
    """All bounds, lowest first. One that rests on an unknown fact is zero: pricing then leaves it undetermined."""
    found = [Bound("LIMIT_PRODUCT", product.amount_fen.max, (), "产品最高额度", "the product's highest amount")]
    if cap:
        found.append(Bound(cap.code, cap.value, (), cap.zh, cap.en, cap.authority))
    if product.turnover_share:
        sales = known.integer("tax.sales_12m_fen") or 0
        share = product.turnover_share[grade]
        zh = f"年开票销售额的{share:.0%}（等级{grade}）"
        en = f"{share:.0%} of a year's invoiced sales (grade {grade})"
        found.append(Bound("LIMIT_TURNOVER", _down(sales * share), ("tax.sales_12m_fen",), zh, en))
    if product.payment_share:
        found.append(_affordable(product, grade, term_months, apr_ppm, known))
    return sorted(found, key=lambda bound: bound.amount_fen)


def _affordable(product: Product, grade: str, term_months: int, apr_ppm: int, known: Evidence) -> Bound:
    """What the income can repay: the lowest income anybody states, less what existing debt already takes."""
    incomes = {
        "declared.monthly_income_fen": known.integer("declared.monthly_income_fen"),
        "tax.annual_income_fen": _twelfth(known.integer("tax.annual_income_fen")),
        "bank.monthly_inflow_fen": known.integer("bank.monthly_inflow_fen"),
    }
    stated = {name: value for name, value in incomes.items() if value is not None}
    source, income = min(stated.items(), key=lambda item: item[1], default=("declared.monthly_income_fen", 0))
    share = product.payment_share[grade]
    free = max(Decimal(0), income * share - (known.integer("credit.monthly_payment_fen") or 0))
    rate = monthly_rate(apr_ppm)
    worth = free * (1 - (1 + rate) ** -term_months) / rate if rate else free * term_months
    return Bound(
        "LIMIT_INCOME", _down(worth), (source, "credit.monthly_payment_fen"),
        f"月还款不超过月收入的{share:.0%}（等级{grade}，扣除现有债务月还款）",
        f"instalments within {share:.0%} of monthly income (grade {grade}), existing debt first",
    )  # fmt: skip


def _twelfth(yearly: int | None) -> int | None:
    return None if yearly is None else yearly // 12


def _down(amount: Decimal) -> int:
    return int((amount / STEP_FEN).to_integral_value(ROUND_FLOOR)) * STEP_FEN
