"""Applications: what is sound, what differs, which history is intact."""

import pytest
from lending.intake.v1.intake_service_pb2 import Application
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.errors import InvalidRequest, WrongState
from loanmesh.runtime.identity import resident_check
from services.intake.application import OUTPUT_ONLY, Happening, State, chain, differing, require_allowed, unsound
from services.intake.store.filter import parse_filter
from tests.builders import NOW, an_application


def test_a_synthetic_application_is_sound() -> None:
    assert list(unsound(an_application("person"), NOW)) == []
    assert list(unsound(an_application("firm"), NOW)) == []


def test_what_is_unsound_is_named_but_never_quoted() -> None:
    application = an_application()
    number = application.parties[0].identity.value
    application.parties[0].identity.value = number[:-1] + ("0" if number[-1] != "0" else "1")
    ((field, rule),) = unsound(application, NOW)
    assert field == "application.parties[0].identity.value"
    assert number[:6] not in rule
    application.parties[0].identity.kind = Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE
    assert [f for f, _ in unsound(application, NOW)] == ["application.parties[0].identity.kind"]
    application.parties[0].role = Party.ROLE_GUARANTOR
    assert "application.parties" in [f for f, _ in unsound(application, NOW)]


@pytest.mark.parametrize("born", ["20300101", "18500101"])
def test_a_date_of_birth_that_cannot_be_is_refused(born: str) -> None:
    application = an_application()
    first_17 = f"990000{born}001"
    application.parties[0].identity.value = first_17 + resident_check(first_17)
    ((field, rule),) = unsound(application, NOW)
    assert field == "application.parties[0].identity.value"
    assert "date of birth" in rule
    assert born not in rule


def test_a_time_that_cannot_be_is_no_crash() -> None:
    application = an_application()
    application.consents[0].given_time.seconds = 10**15
    assert [f for f, _ in unsound(application, NOW)] == ["application.consents[0].given_time"]


def test_differences_are_named_by_path() -> None:
    one, other = an_application(), an_application()
    other.loan.amount_fen += 100
    other.channel = "web"
    assert list(differing(one, other)) == ["loan.amount_fen", "channel"]
    assert list(differing(one, one)) == []


def test_output_only_fields_exist() -> None:
    assert set(OUTPUT_ONLY) <= {field.name for field in Application.DESCRIPTOR.fields}


def test_a_changed_event_breaks_the_chain() -> None:
    first = Happening(1, "accepted", 1.0, "a", {})
    assert chain("", "id", first) != chain("", "id", Happening(1, "accepted", 1.0, "b", {}))
    assert chain("x", "id", first) != chain("", "id", first)


def test_a_forbidden_change_names_state_and_way_out() -> None:
    with pytest.raises(WrongState, match=r"it is PENDING, not DECIDED; WatchApplication"):
        require_allowed("accept an offer of", "0192", State.PENDING)


def test_filters_are_read_or_refused() -> None:
    conditions, params = parse_filter('state = DECIDED AND create_time >= "2026-11-24T00:00:00Z"')
    assert conditions == ["CASE a.state WHEN 'PARKED' THEN 'PENDING' ELSE a.state END = ?", "a.created_at >= ?"]
    assert params[0] == "DECIDED"
    for wrong in ("colour = red", "state > 1", "create_time > yesterday", "state = 'x' OR 1"):
        with pytest.raises(InvalidRequest):
            parse_filter(wrong)
