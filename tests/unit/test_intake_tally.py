"""Decisions are counted when they are committed, and only then."""

from __future__ import annotations

from loanmesh.runtime.vitals import Vitals
from services.intake.application import Claim
from services.intake.ports import Decided, Deferred
from services.intake.tally import tally


def a_claim(id_: str) -> Claim:
    return Claim(id_, "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 1.7e9)


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
    assert vitals.decisions == {"approved": 2, "declined": 1}
    assert vitals.degradations == {"without_bank_flow": 1, "serve_cached:court": 1}
