"""Synthetic identities: right check characters, in regions that no real person or firm has (99....)."""

from __future__ import annotations

import datetime as dt

from loanmesh.runtime.identity import credit_check, resident_check

PERSONS_MAX = 10_000_000
"""How many synthetic persons there are: four digits of region, three of sequence."""
REAL_FIRMS_FROM = 900_000_000
"""Firm numbers from here stand for the firms of the real data set: E124 is 900,000,124."""


def resident_id(index: int, born: dt.date) -> str:
    """Identity number of synthetic person `index`, 0 to 9,999,999."""
    first = f"99{index // 1000:04d}{born:%Y%m%d}{index % 1000:03d}"
    return first + resident_check(first)


def person_index(number: str) -> int | None:
    """Which synthetic person a number belongs to; None for any other."""
    return (
        int(number[2:6]) * 1000 + int(number[14:17]) if number.startswith("99") and number[2:17].isdecimal() else None
    )


def credit_code(index: int) -> str:
    """Social credit code of synthetic firm `index`, 0 to 999,999,999."""
    first = f"91990000{index:09d}"
    return first + credit_check(first)


def firm_index(code: str) -> int | None:
    """Which synthetic firm a code belongs to; None for any other."""
    return int(code[8:17]) if code.startswith("91990000") and code[8:17].isdecimal() else None


def real_firm_code(firm: str) -> str:
    """Code that stands for a firm of the real data set, e.g. `E124`."""
    return credit_code(REAL_FIRMS_FROM + int(firm.removeprefix("E")))
