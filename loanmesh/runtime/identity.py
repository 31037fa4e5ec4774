"""The two identity numbers: their check characters, and what they tell. Never log or quote a number."""

from __future__ import annotations

import datetime as dt
from operator import mul

_RESIDENT_WEIGHTS = tuple(pow(2, 17 - i, 11) for i in range(17))
_RESIDENT_CHECKS = "10X98765432"
_CREDIT_ALPHABET = "0123456789ABCDEFGHJKLMNPQRTUWXY"
_CREDIT_WEIGHTS = tuple(pow(3, i, 31) for i in range(17))


def resident_check(first_17: str) -> str:
    """Check character of a resident identity number (GB 11643-1999, ISO 7064 MOD 11-2)."""
    return _RESIDENT_CHECKS[sum(map(mul, map(int, first_17), _RESIDENT_WEIGHTS)) % 11]


def credit_check(first_17: str) -> str:
    """Check character of a unified social credit code (GB 32100-2015, base 31). ValueError for other letters."""
    return _CREDIT_ALPHABET[-sum(map(mul, map(_CREDIT_ALPHABET.index, first_17), _CREDIT_WEIGHTS)) % 31]


def valid_resident_id(number: str) -> bool:
    """Whether the 18 characters have a date of birth that exists and the right check character."""
    if len(number) != 18 or not number[:17].isdecimal() or not number.isascii():
        return False
    return birth_date(number) is not None and number[17] == resident_check(number[:17])


def valid_credit_code(number: str) -> bool:
    """Whether the 18 characters are of the code's alphabet and the check character is right."""
    return len(number) == 18 and all(c in _CREDIT_ALPHABET for c in number) and number[17] == credit_check(number[:17])


def birth_date(resident_id: str) -> dt.date | None:
    """Date of birth that a resident identity number states; None where there is no such day."""
    try:
        return dt.date(int(resident_id[6:10]), int(resident_id[10:12]), int(resident_id[12:14]))
    except ValueError:
        return None


def age_on(resident_id: str, day: dt.date) -> int | None:
    """Age in whole years on a day; None where the number states no date."""
    born = birth_date(resident_id)
    if born is None:
        return None
    return day.year - born.year - ((day.month, day.day) < (born.month, born.day))
