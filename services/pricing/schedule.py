"""Repayment in equal monthly amounts (等额本息), exact to the fen, and what it costs a year.

Whole numbers throughout: a twelfth of a rate in ppm has no end as a decimal, as a fraction it is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyxirr

PPM = 1_000_000
_YEAR = 12 * PPM
"""A month's interest is balance x apr_ppm / _YEAR."""


class Instalment(NamedTuple):
    """One month; amounts in fen."""

    number: int
    payment_fen: int
    principal_fen: int
    interest_fen: int
    balance_fen: int


def level_payment_fen(principal_fen: int, apr_ppm: int, term_months: int) -> int:
    """The equal monthly amount, fen, rounded half up: P r / (1 - (1 + r)^-n) with r = apr / 12.

    Raises ValueError out of range.
    """
    if principal_fen <= 0 or apr_ppm < 0 or not 1 <= term_months <= 360:
        raise ValueError("principal must be above 0, apr not below 0, term 1 to 360 months")
    if apr_ppm == 0:
        return _half_up(principal_fen, term_months)
    grown, flat = (_YEAR + apr_ppm) ** term_months, _YEAR**term_months
    return _half_up(principal_fen * apr_ppm * grown, _YEAR * (grown - flat))


def schedule(principal_fen: int, apr_ppm: int, term_months: int) -> list[Instalment]:
    """Month by month. The last instalment takes up the rounding, so that the balance after it is exactly zero.

    Raises ValueError out of range.
    """
    balance, months = principal_fen, []
    for number, payment in enumerate(payments_fen(principal_fen, apr_ppm, term_months), 1):
        interest = _half_up(balance * apr_ppm, _YEAR)
        principal = payment - interest
        balance -= principal
        months.append(Instalment(number, payment, principal, interest, balance))
    return months


def payments_fen(principal_fen: int, apr_ppm: int, term_months: int) -> list[int]:
    """What is paid, first to last: the schedule without its parts. Raises ValueError out of range."""
    payment, balance = level_payment_fen(principal_fen, apr_ppm, term_months), principal_fen
    payments = []
    for _ in range(term_months - 1):
        # As `_half_up`, which costs as much to call as to compute.
        interest = (2 * balance * apr_ppm + _YEAR) // (2 * _YEAR)
        # Where a few fen run over many months, payments rounded up can repay the loan before its last month.
        paid = payment if payment - interest < balance else balance + interest
        balance -= paid - interest
        payments.append(paid)
    payments.append(balance + _half_up(balance * apr_ppm, _YEAR))
    return payments


def effective_ppm(principal_fen: int, payments_fen: Sequence[int]) -> int:
    """What the borrower really pays a year, ppm: the internal rate of return, compounded (PBoC 2021-3).

    Raises ArithmeticError where there is none: a cost that cannot be told is never shown as zero.
    """
    monthly = pyxirr.irr([-principal_fen, *payments_fen])
    if monthly is None:
        raise ArithmeticError("these payments have no internal rate of return")
    return round(((1 + monthly) ** 12 - 1) * PPM)


def _half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)
