"""Counts what was committed, for the process's vitals: decisions by outcome and by the
steps that shaped them, and what was parked by the stage it broke."""

from __future__ import annotations

from collections.abc import Iterable

from loanmesh.runtime.vitals import Vitals
from services.intake.ports import Decided, Parked, Result


def tally(vitals: Vitals, committed: Iterable[Result]) -> None:
    """Count the decisions among what was committed, and what was parked."""
    for result in committed:
        if isinstance(result, Decided):
            vitals.decisions[result.outcome.lower()] += 1
            vitals.degradations.update(filter(None, result.details.get("degradations", "").split(",")))
        elif isinstance(result, Parked):
            vitals.parked[result.stage] += 1
