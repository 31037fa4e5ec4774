"""What a caller may ask of a list, and what is refused by name."""

from __future__ import annotations

import base64
import datetime as dt

import pytest

from loanmesh.runtime.errors import InvalidRequest
from services.intake.store.filter import parse_filter
from services.intake.store.listing import open_token


def test_conditions_are_joined_and_bound() -> None:
    conditions, params = parse_filter('state = DECIDED AND channel != "partner-x"')
    assert conditions == [
        "CASE a.state WHEN 'PARKED' THEN 'PENDING' ELSE a.state END = ?",
        "(a.channel IS NULL OR a.channel != ?)",
    ]
    assert params == ["DECIDED", "partner-x"]


def test_a_time_counts_in_its_own_zone() -> None:
    at = dt.datetime(2026, 11, 24, tzinfo=dt.UTC).timestamp()
    for text in ("2026-11-24T08:00:00+08:00", "2026-11-24T00:00:00Z", "2026-11-24T00:00:00"):
        assert parse_filter(f'create_time >= "{text}"')[1] == [at]


@pytest.mark.parametrize(
    "text",
    [
        "colour = red",
        "state = FOO",
        "state = decided",
        "outcome = MAYBE",
        'grade = "A',
        "grade = \x00",
        "channel = \x00",
        "state > DECIDED",
        "create_time > yesterday",
        "state =",
    ],
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_filter(text)
    assert refused.value.violations[0][0] == "filter"


@pytest.mark.parametrize("said", ["null", '["abc", "x", "tag"]', "[1, 2, 3]", "[]", "{}", "nonsense"])
def test_a_page_token_that_is_none_of_ours_is_refused(said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        open_token(base64.urlsafe_b64encode(said.encode()).decode(), "tag")
    assert refused.value.violations[0][0] == "page_token"
