"""The history checker: for each rule a history that can be true, and a planted one that cannot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1 import intake_service_pb2 as pb

from lab import history
from lab.history import (
    AcceptAsked,
    Accepted,
    Acknowledged,
    Decided,
    Event,
    Offer,
    Read,
    Record,
    Recorder,
    Report,
    Standing,
    Submitted,
    Told,
)
from lab.judge import SOURCES, Violation, by_rule, check
from tests.builders import a_profile

NAME = "lenders/demo/applications/1"
REPORTS = tuple(Report(source, "FRESH", 1000.0) for source in SOURCES)
SUBMITTED = Submitted(1.0, "shop", "request-1")
ACKNOWLEDGED = Acknowledged(2.0, "shop", "request-1", NAME, 1, "PENDING")
PENDING = Read(2.0, "shop", NAME, 1, "PENDING", 0, "", "")
DECIDED = Decided(3.0, NAME, 1, "APPROVED", "d1", 3.0, (Offer("offer-1", 500), Offer("offer-2", 300)))
READ = Read(3.0, "shop", NAME, 2, "DECIDED", 1, "d1", "")
ASKED = AcceptAsked(4.0, "shop", NAME, "offer-1")
ACCEPTED = Accepted(5.0, "shop", NAME, "offer-1")
READ_ACCEPTED = Read(5.0, "shop", NAME, 3, "OFFER_ACCEPTED", 1, "d1", "offer-1")
TOLD = Told(6.0, NAME, (Event(1, "accepted", ""), Event(2, "decided", "1"), Event(3, "offer_accepted", "")), True)
END = Standing(7.0, NAME, 3, "OFFER_ACCEPTED", 1, "d1", "offer-1", "", None, None)
WHOLE: tuple[Record, ...] = (
    SUBMITTED, ACKNOWLEDGED, PENDING, DECIDED, READ, ASKED, ACCEPTED, READ_ACCEPTED, TOLD, END,
)  # fmt: skip


def broken(records: Sequence[Record]) -> list[str]:
    """The rules that a history breaks."""
    return sorted(by_rule(check(records)))


def test_a_whole_life_breaks_no_rule() -> None:
    assert check(WHOLE) == []


def test_a_pending_application_with_an_estimate_an_owner_or_a_due_time_is_not_lost() -> None:
    end = Standing(7.0, NAME, 1, "PENDING", 0, "", "", "", None, None)
    for kept in (replace(end, estimate_at=9.0), replace(end, owner="intake-1"), replace(end, due_at=9.0)):
        assert broken([SUBMITTED, ACKNOWLEDGED, PENDING, kept]) == []


def test_an_application_that_is_gone_is_lost() -> None:
    assert broken([SUBMITTED, ACKNOWLEDGED, PENDING]) == ["nothing_is_lost"]


def test_an_application_that_nobody_will_ever_look_at_is_lost() -> None:
    end = Standing(7.0, NAME, 1, "PENDING", 0, "", "", "", None, None)
    assert broken([SUBMITTED, ACKNOWLEDGED, PENDING, end]) == ["nothing_is_lost"]


def test_what_was_never_acknowledged_may_be_missing() -> None:
    assert broken([SUBMITTED]) == []


def test_two_decisions_of_one_assessment_are_found() -> None:
    found = check([*WHOLE, replace(DECIDED, at=8.0, digest="d2", outcome="COUNTER_OFFER")])
    assert found == [
        Violation("decided_once", NAME, "assessment 1 has two decisions", (DECIDED, found[0].records[1])),
    ]


def test_a_second_assessment_may_decide_otherwise() -> None:
    told = replace(TOLD, events=(*TOLD.events[:2], Event(3, "decided", "2")))
    again = replace(DECIDED, assessment=2, digest="d2")
    assert "decided_once" not in broken([*WHOLE, again, told])


def test_two_decided_events_in_one_assessment_are_found() -> None:
    told = replace(TOLD, events=(*TOLD.events, Event(4, "decided", "1")))
    assert broken([*WHOLE, told]) == ["decided_once"]


def test_two_readers_of_one_revision_who_see_different_things_are_found() -> None:
    for other in (
        replace(READ, reader="bank", digest="d2"),
        replace(READ, reader="bank", state="WITHDRAWN"),
        replace(END, accepted_offer=""),
    ):
        assert "readers_agree" in broken([*WHOLE[:-1], other])


def test_a_reader_who_goes_back_is_found_and_two_readers_may_differ() -> None:
    assert broken([*WHOLE, replace(READ, at=8.0)]) == ["readers_go_forward"]
    assert broken([*WHOLE, replace(READ, at=8.0, reader="bank")]) == []


def test_a_decision_that_is_taken_back_is_found() -> None:
    later = Read(8.0, "shop", NAME, 4, "PENDING", 0, "", "")
    end = replace(END, revision=4, state="PENDING", assessment=0, digest="", accepted_offer="", owner="intake-1")
    assert broken([SUBMITTED, ACKNOWLEDGED, DECIDED, READ, later, end]) == ["readers_go_forward"]


def test_information_supplied_makes_an_application_pending_again() -> None:
    waits = Read(3.0, "shop", NAME, 2, "AWAITING_INFORMATION", 0, "", "")
    again = Read(4.0, "shop", NAME, 3, "PENDING", 0, "", "")
    assert broken([PENDING, waits, again]) == []


def test_a_request_that_became_two_applications_is_found() -> None:
    twin = replace(ACKNOWLEDGED, name="lenders/demo/applications/2")
    assert "requests_keep_their_name" in broken([*WHOLE, twin])
    assert broken([*WHOLE, ACKNOWLEDGED]) == []


def test_two_requests_that_became_one_application_are_found() -> None:
    assert "requests_keep_their_name" in broken([*WHOLE, replace(ACKNOWLEDGED, request_id="request-2")])


def test_an_acceptance_that_is_not_on_record_is_found() -> None:
    end = replace(END, state="DECIDED", revision=2, accepted_offer="")
    assert "acceptances_add_up" in broken([*WHOLE[:-1], end])


def test_two_accepted_offers_are_found() -> None:
    assert "acceptances_add_up" in broken([*WHOLE, replace(ACCEPTED, offer_id="offer-2")])


def test_an_accepted_offer_that_was_never_made_is_found() -> None:
    assert broken([*WHOLE, replace(READ_ACCEPTED, accepted_offer="offer-9", revision=4)]) == ["acceptances_add_up"]


def test_an_acceptance_that_nobody_asked_for_is_found() -> None:
    assert broken([record for record in WHOLE if record not in (ASKED, ACCEPTED)]) == ["acceptances_add_up"]


def test_an_acceptance_whose_answer_was_lost_may_be_on_record() -> None:
    assert broken([record for record in WHOLE if record != ACCEPTED]) == []


def test_money_that_is_on_record_with_another_sum_is_found() -> None:
    other = "lenders/demo/applications/2"
    ends = replace(END, name=other, accepted_offer="")
    added: list[Record] = [
        replace(DECIDED, name=other),
        replace(ASKED, name=other),
        replace(ACCEPTED, name=other),
        ends,
    ]
    texts = [violation.text for violation in check([*WHOLE, *added])]
    assert "clients were told of 1000 fen accepted, and 500 fen are on record" in texts


def test_a_broken_chain_a_gap_and_a_short_history_are_found() -> None:
    for told in (
        replace(TOLD, chain_intact=False),
        replace(TOLD, events=(TOLD.events[0], TOLD.events[2])),
        replace(TOLD, events=TOLD.events[:2]),
        replace(TOLD, events=()),
    ):
        assert broken([*WHOLE[:-2], told, END]) == ["events_hold"]


def test_a_decline_on_complete_evidence_in_date_stands() -> None:
    unknown = replace(REPORTS[0], state="NOT_FOUND")
    assert broken([replace(DECIDED, outcome="DECLINED", offers=(), reports=(unknown, *REPORTS[1:]))]) == []


def test_a_decline_on_stale_missing_or_outdated_evidence_is_found() -> None:
    decline = replace(DECIDED, outcome="DECLINED", offers=(), reports=REPORTS)
    for reports in (
        (replace(REPORTS[0], state="STALE"), *REPORTS[1:]),
        (replace(REPORTS[0], state="MISSING", usable_until=None), *REPORTS[1:]),
        (replace(REPORTS[0], usable_until=3.0), *REPORTS[1:]),
        REPORTS[1:],
    ):
        assert broken([replace(decline, reports=reports)]) == ["declines_rest_on_evidence"]


def test_a_decline_that_nobody_had_explained_is_found() -> None:
    assert broken([replace(DECIDED, outcome="DECLINED", offers=())]) == ["declines_rest_on_evidence"]


def test_an_approval_may_rest_on_partial_evidence() -> None:
    assert broken([replace(DECIDED, reports=REPORTS[1:])]) == []


def test_a_violation_names_application_rule_and_the_records_that_contradict() -> None:
    text = str(check([*WHOLE, replace(READ, at=8.0)])[0])
    assert text.startswith(f"readers_go_forward: {NAME}: shop was shown revision 2 after 3")
    assert text.count("Read(") == 2


def test_a_history_that_was_written_down_reads_the_same() -> None:
    whole = [*WHOLE, replace(DECIDED, reports=REPORTS)]
    sink = io.StringIO()
    history.write(whole, sink)
    assert history.read(sink.getvalue().splitlines()) == whole


def test_the_recorder_writes_down_what_the_mesh_says() -> None:
    application = pb.Application(name=NAME, state=pb.Application.STATE_PENDING, revision=1)
    sink = io.StringIO()
    recorder = Recorder(lambda: 7.0, sink)
    recorder.submitted("shop", "request-1")
    recorder.acknowledged("shop", "request-1", application)
    application.state, application.revision = pb.Application.STATE_DECIDED, 2
    application.decision.assessment = 1
    application.decision.outcome = pb.Decision.OUTCOME_DECLINED
    application.decision.reasons.add(code="TOO_MUCH_DEBT")
    recorder.read("shop", application)
    profile: CreditProfile = a_profile("person", 1)
    explained = pb.ExplainDecisionResponse(decision=application.decision, profile=profile)
    explained.decision.reasons[0].text_en = "too much debt"
    recorder.explained(NAME, explained)
    events = [pb.Event(name=f"{NAME}/events/1", kind="accepted"), pb.Event(name=f"{NAME}/events/2", kind="decided")]
    recorder.told(NAME, events, chain_intact=True)
    recorder.standing(application)
    assert check(recorder.records) == []
    assert [type(record).__name__ for record in recorder.records] == [
        "Submitted", "Acknowledged", "Read", "Decided", "Read", "Decided", "Told", "Standing",
    ]  # fmt: skip
    assert history.read(sink.getvalue().splitlines()) == recorder.records
