"""Identity numbers: GB 11643 and GB 32100."""

import datetime as dt

from hypothesis import given
from hypothesis.strategies import dates, integers

from lab.identity import credit_code, firm_index, person_index, real_firm_code, resident_id
from loanmesh.runtime.identity import age_on, valid_credit_code, valid_resident_id


def test_the_standards_own_examples_are_valid() -> None:
    assert valid_resident_id("11010519491231002X")  # The example printed in GB 11643.
    assert not valid_resident_id("110105194912310021")


@given(integers(0, 9_999_999), dates(dt.date(1930, 1, 1), dt.date(2020, 1, 1)))
def test_synthetic_persons_are_valid_and_come_back(index: int, born: dt.date) -> None:
    number = resident_id(index, born)
    assert valid_resident_id(number)
    assert person_index(number) == index
    assert age_on(number, born.replace(day=1) + dt.timedelta(days=40)) == 0


@given(integers(0, 999_999_999))
def test_synthetic_firms_are_valid_and_come_back(index: int) -> None:
    code = credit_code(index)
    assert valid_credit_code(code)
    assert firm_index(code) == index


@given(integers(0, 17))
def test_one_wrong_character_is_found(position: int) -> None:
    code = real_firm_code("E124")
    wrong = code[:position] + ("1" if code[position] != "1" else "2") + code[position + 1 :]
    assert not valid_credit_code(wrong)
