"""Counts what was committed, for the process's vitals: decisions by outcome, and by the steps that shaped them."""

from __future__ import annotations

from collections.abc import Sequence

from loanmesh.runtime.vitals import Vitals
from services.intake.ports import Decided, Result, Settlement


class Tallied:
    """A store's settling, counted."""

    def __init__(self, store: Settlement, vitals: Vitals) -> None:
        self._store = store
        self._vitals = vitals

    async def settle(self, results: Sequence[Result]) -> set[str]:
        """As the store's."""
        committed = await self._store.settle(results)
        for result in results:
            if isinstance(result, Decided) and result.claim.id in committed:
                self._vitals.decisions[result.outcome.lower()] += 1
                self._vitals.degradations.update(filter(None, result.details.get("degradations", "").split(",")))
        return committed
