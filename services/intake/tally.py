"""Counts what was committed, for the process's vitals: decisions by outcome and by the
steps that shaped them, and what was parked by the stage it broke."""

from __future__ import annotations

from collections.abc import Iterable

from loanmesh.runtime.vitals import Decision, Vitals
from services.intake.ports import Decided, Parked, Result
from services.intake.reception import PRIORITIES, Record


def tally(vitals: Vitals, committed: Iterable[Result], record: Record = lambda *_: None) -> None:
    """Count the decisions among what was committed, and what was parked.

    record  takes how long each one was decided after it was acknowledged, but where it waited for its applicant.
    """
    for result in committed:
        if isinstance(result, Decided):
            outcome, claim = result.outcome.lower(), result.claim
            vitals.decisions[Decision(outcome, result.product, result.grade)] += 1
            if not claim.supplied:
                # Two replicas' clocks: the difference may be a little below nothing.
                took_s = max(0.0, result.decided_at - claim.created_at)
                record(took_s, {"loanmesh.priority": PRIORITIES[claim.priority], "loanmesh.outcome": outcome})
            vitals.degradations.update(filter(None, result.details.get("degradations", "").split(",")))
        elif isinstance(result, Parked):
            vitals.parked[result.stage] += 1
