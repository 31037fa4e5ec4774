"""What comes in is counted at the door, and decisions when they are committed, and only then."""

from __future__ import annotations

from dataclasses import replace

from loanmesh.runtime.vitals import Vitals
from services.intake.application import Claim, New, Stored
from services.intake.ports import Decided, Deferred
from services.intake.reception import Reception
from services.intake.tally import tally


def a_claim(id_: str) -> Claim:
    return Claim(id_, "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 1.7e9)


def a_new(id_: str, priority: int) -> New:
    return New(id_, "lenders/demo", "shop", f"r-{id_}", b"", "", priority, "app", 1.7e9)


def decided(id_: str, outcome: str, degradations: str = "") -> Decided:
    return Decided(a_claim(id_), outcome, "A", b"", b"", b"", b"", 1.7e9, None, {"degradations": degradations})


def test_what_was_committed_is_counted_by_outcome_and_step() -> None:
    vitals = Vitals()
    tally(
        vitals,
        [
            decided("a", "APPROVED", "without_bank_flow,serve_cached:court"),
            decided("b", "APPROVED"),
            decided("c", "DECLINED"),
            Deferred(a_claim("e"), ("source_missing:tax",), 1.0, 1.7e9),
        ],
    )
    assert vitals.decisions == {("approved", "", "A"): 2, ("declined", "", "A"): 1}
    assert vitals.degradations == {"without_bank_flow": 1, "serve_cached:court": 1}


def test_the_time_to_a_decision_is_recorded_but_not_of_who_waited_for_the_applicant() -> None:
    recorded: list[tuple[float, dict[str, str]]] = []
    ours, supplied = decided("a", "APPROVED"), decided("b", "APPROVED")
    committed = [
        replace(ours, decided_at=ours.claim.created_at + 2.5),
        replace(supplied, claim=replace(supplied.claim, supplied=True)),
    ]
    tally(Vitals(), committed, lambda took_s, by: recorded.append((took_s, dict(by))))
    assert recorded == [(2.5, {"loanmesh.priority": "interactive", "loanmesh.outcome": "approved"})]


def test_what_comes_is_offered_and_what_was_stored_before_is_not_accepted_again() -> None:
    vitals, recorded = Vitals(), list[tuple[float, dict[str, str]]]()
    reception = Reception(vitals, lambda took_s, by: recorded.append((took_s, dict(by))))
    news = [a_new("a", priority=3), a_new("b", priority=1)]
    reception.offered(new.priority for new in news)
    reception.acknowledged(news, [Stored("a", "", existed=False), Stored("b", "", existed=True)], 0.25)
    assert vitals.offered == {"bulk": 1, "interactive": 1}
    assert vitals.accepted == {"bulk": 1}
    assert recorded == [(0.25, {"loanmesh.priority": "bulk"})]
