"""Decisions are counted when they are committed, and only then."""

from __future__ import annotations

from collections.abc import Sequence

from loanmesh.runtime.vitals import Vitals
from services.intake.application import Claim
from services.intake.ports import Decided, Deferred, Result
from services.intake.tally import Tallied


def a_claim(id_: str) -> Claim:
    return Claim(id_, "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 1.7e9)


def decided(id_: str, outcome: str, degradations: str = "") -> Decided:
    return Decided(a_claim(id_), outcome, "A", b"", b"", b"", b"", 1.7e9, None, {"degradations": degradations})


class Store:
    """Commits all but those whose fence was lost."""

    def __init__(self, lost: str) -> None:
        self.lost = lost

    async def settle(self, results: Sequence[Result]) -> set[str]:
        return {result.claim.id for result in results} - {self.lost}


async def test_what_was_committed_is_counted_by_outcome_and_step() -> None:
    vitals = Vitals()
    store = Tallied(Store(lost="d"), vitals)
    committed = await store.settle(
        [
            decided("a", "APPROVED", "without_bank_flow,serve_cached:court"),
            decided("b", "APPROVED"),
            decided("c", "DECLINED"),
            decided("d", "DECLINED"),
            Deferred(a_claim("e"), ("source_missing:tax",), 1.0, 1.7e9),
        ]
    )
    assert committed == {"a", "b", "c", "e"}
    assert vitals.decisions == {"approved": 2, "declined": 1}
    assert vitals.degradations == {"without_bank_flow": 1, "serve_cached:court": 1}
