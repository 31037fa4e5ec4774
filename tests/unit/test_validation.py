"""What is told of wrong requests, and what it may cost to tell it."""

from __future__ import annotations

import datetime as dt

import pytest
from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb

from lab.population import Population
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.status import item_status
from loanmesh.runtime.validation import violations

NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)


def a_request() -> pb.SubmitApplicationRequest:
    application = json_format.ParseDict(Population().application("person", 1, NOW), pb.Application())
    return pb.SubmitApplicationRequest(parent="lenders/demo", request_id="request-0001", application=application)


def test_all_that_is_wrong_with_a_request_is_told_at_once() -> None:
    wrong = a_request()
    wrong.parent, wrong.request_id = "nobody", "!"
    wrong.application.channel = "NO"
    assert [field for field, _ in violations(wrong)] == ["parent", "request_id", "application.channel"]
    assert [field for field, _ in violations(wrong, thorough=False)] == ["parent"]


@pytest.mark.parametrize("most", [60, 30_000])
def test_a_request_of_very_many_wrong_parts_is_not_looked_through(most: int) -> None:
    wrong = a_request()
    wrong.parent = "nobody"
    for _ in range(most):
        wrong.application.consents.add()
    assert [field for field, _ in violations(wrong)] == ["parent"]


def test_a_list_that_is_too_long_is_told_before_what_is_in_it() -> None:
    wrong = a_request()
    for _ in range(30_000):
        wrong.application.consents.add()
    ((field, rule),) = violations(wrong)
    assert field == "application.consents"
    assert "50" in rule


def test_what_only_answers_hold_is_not_read_in_a_request() -> None:
    sound = a_request()
    for _ in range(1000):
        sound.application.decision.offers.add(principal_fen=-1)
        sound.application.missing_information.add()
    assert violations(sound) == []


def test_what_is_wrong_with_a_request_fits_into_what_clients_read() -> None:
    told = InvalidRequest(*[(f"application.consents[{n}].source", "must be one of " + "x" * 60) for n in range(500)])
    assert 1 < len(told.violations) <= 20
    assert len(item_status(told).SerializeToString()) + len(str(told)) < 8192 * 3 // 4
    (longest,) = InvalidRequest(("field", "x" * 5000), ("other", "y")).violations
    assert longest[0] == "field", "one is told in any case"
