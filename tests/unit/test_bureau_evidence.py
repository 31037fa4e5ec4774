"""What counts as consent, as fresh and as a fact."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis.strategies import floats
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.type.v1.party_pb2 import Consent, Party

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.consent import CLOCK_SKEW_S, has_consent
from services.bureau.freshness import is_fresh, is_usable
from services.bureau.profile import Answer, Missing, report
from services.bureau.sources import Garbage, load_sources

NOW = FakeClock().now()
SOURCES = load_sources()


def a_consent(
    source: str = "tax",
    purpose: Consent.Purpose.ValueType = Consent.PURPOSE_CREDIT_ASSESSMENT,
    role: Party.Role.ValueType = Party.ROLE_UNSPECIFIED,
    given_s: float = -60,
    expire_s: float | None = None,
) -> Consent:
    """A consent, with times in seconds from now."""
    consent = Consent(source=source, purpose=purpose, party_role=role)
    consent.given_time.FromDatetime(NOW + dt.timedelta(seconds=given_s))
    if expire_s is not None:
        consent.expire_time.FromDatetime(NOW + dt.timedelta(seconds=expire_s))
    return consent


@pytest.mark.parametrize(
    ("consent", "in_force"),
    [
        (a_consent(), True),
        (a_consent(role=Party.ROLE_BORROWER), True),
        (a_consent(role=Party.ROLE_GUARANTOR), False),
        (a_consent(source="court"), False),
        (a_consent(purpose=Consent.PURPOSE_POST_LOAN_MONITORING), False),
        (a_consent(expire_s=1), True),
        (a_consent(expire_s=0), False),
        (a_consent(given_s=CLOCK_SKEW_S), True),
        (a_consent(given_s=CLOCK_SKEW_S + 1), False),
    ],
)
def test_a_consent_is_in_force_for_its_party_source_purpose_and_time(consent: Consent, in_force: bool) -> None:
    borrower = Party(role=Party.ROLE_BORROWER, kind=Party.KIND_FIRM)
    assert has_consent([consent], borrower, "tax", NOW) is in_force


def test_one_consent_in_force_is_enough() -> None:
    borrower = Party(role=Party.ROLE_BORROWER)
    assert has_consent([a_consent(expire_s=-1), a_consent()], borrower, "tax", NOW)
    assert not has_consent([], borrower, "tax", NOW)


@given(floats(0, 1e7))
def test_what_is_fresh_is_usable_and_neither_comes_back(age_s: float) -> None:
    for source in SOURCES.values():
        fresh, usable = is_fresh(0, source, age_s), is_usable(0, source, age_s)
        assert usable or not fresh
        assert fresh == (age_s < source.fresh_for_s)
        assert usable == (age_s < source.usable_for_s)


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        (None, "STATE_NO_CONSENT"),
        (Missing("timeout", 5.0), "STATE_MISSING"),
        (Answer(True, {"court.enforcement_open_count": 0}, 0, 1), "STATE_FRESH"),
        (Answer(False, {}, 0, 1), "STATE_NOT_FOUND"),
        (Answer(True, {}, -86_400, 1), "STATE_STALE"),
    ],
)
def test_a_report_says_how_it_went(answer: Answer | Missing | None, state: str) -> None:
    made = report(SOURCES["court"], answer, now_s=2)
    assert SourceReport.State.Name(made.state) == state
    assert made.HasField("retry_time") == isinstance(answer, Missing)
    if isinstance(answer, Answer):
        # A decline may rest on it for a day from when it was true at the source.
        assert made.usable_until_time.seconds - made.observed_time.seconds == 86_400


def test_values_keep_their_type() -> None:
    facts = {"registry.is_active": True, "registry.age_months": 3, "registry.industry": "C2199"}
    made = report(SOURCES["registry"], Answer(True, facts, 0, 0), now_s=1)
    assert [a.value.WhichOneof("kind") for a in made.attributes] == ["flag", "integer", "text"]


def test_an_answer_comes_back_as_it_was_stored() -> None:
    answer = Answer(True, {"tax.sales_growth": 0.1, "tax.sales_12m_fen": -5, "x": True, "y": "字"}, 1.5, 2.5)
    assert Answer.from_json(answer.to_json()) == answer


@pytest.mark.parametrize(
    "facts",
    [
        ["court.enforcement_open_count"],
        "none",
        None,
        {"tax.sales_12m_fen": 1},
        {"court.enforcement_open_count": True},
        {"court.enforcement_open_count": 1.0},
        {"court.enforcement_open_count": 2**63},
        {"court.is_dishonest_debtor": "no"},
    ],
)
def test_nonsense_is_garbage(facts: object) -> None:
    with pytest.raises(Garbage):
        SOURCES["court"].read("firm", facts)


@pytest.mark.parametrize("text", ["\ud800", "a\x00", "x" * 101])
def test_text_that_no_message_can_carry_is_garbage(text: str) -> None:
    with pytest.raises(Garbage):
        SOURCES["registry"].read("firm", {"registry.industry": text})


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "0.1", True])
def test_a_number_is_a_finite_number(number: object) -> None:
    with pytest.raises(Garbage):
        SOURCES["tax"].read("firm", {"tax.sales_growth": number})


def test_an_absent_fact_is_absent_not_zero() -> None:
    assert SOURCES["tax"].read("firm", {"tax.sales_growth": None, "tax.gross_margin": 1}) == {"tax.gross_margin": 1.0}
