"""Repayment in equal monthly amounts (等额本息), exact to the fen, and what it costs a year."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal, getcontext

getcontext().prec = 34
PPM = 1_000_000


@dataclass(frozen=True)
class Instalment:
    """One month; amounts in fen."""

    number: int
    payment_fen: int
    principal_fen: int
    interest_fen: int
    balance_fen: int


def level_payment_fen(principal_fen: int, apr_ppm: int, term_months: int) -> int:
    """The equal monthly amount, fen, rounded half up: P r / (1 - (1 + r)^-n) with r = apr / 12."""
    if principal_fen <= 0 or apr_ppm < 0 or not 1 <= term_months <= 360:
        raise ValueError("principal must be above 0, apr not below 0, term 1 to 360 months")
    rate = monthly_rate(apr_ppm)
    exact = principal_fen * rate / (1 - (1 + rate) ** -term_months) if rate else Decimal(principal_fen) / term_months
    return _round(exact)


def schedule(principal_fen: int, apr_ppm: int, term_months: int) -> list[Instalment]:
    """Month by month. The last instalment takes up the rounding, so that the balance after it is exactly zero.

    Raises ValueError out of range.
    """
    payment, rate, balance = (
        level_payment_fen(principal_fen, apr_ppm, term_months),
        monthly_rate(apr_ppm),
        principal_fen,
    )
    months = []
    for number in range(1, term_months + 1):
        interest = _round(balance * rate)
        principal = balance if number == term_months else min(balance, payment - interest)
        balance -= principal
        months.append(Instalment(number, principal + interest, principal, interest, balance))
    return months


def monthly_rate(apr_ppm: int) -> Decimal:
    """One twelfth of the nominal yearly rate, as a fraction."""
    return Decimal(apr_ppm) / PPM / 12


def effective_ppm(principal_fen: int, payments_fen: list[int]) -> int:
    """What the borrower really pays a year, ppm: the internal rate of return, compounded (PBoC 2021-3)."""
    import pyxirr

    monthly = pyxirr.irr([-principal_fen, *payments_fen])
    return round(((1 + (monthly or 0.0)) ** 12 - 1) * PPM)


def _round(amount: Decimal) -> int:
    return int(amount.quantize(Decimal(1), ROUND_HALF_UP))
