"""Waiting for decisions on callers' behalf: the worker tells of those committed here, the store has the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from services.intake.application import FINAL, New, Snapshot, State, Stored
from services.intake.ports import Awaiting, Decided, Parked, Records
from services.intake.watch import Watch, Watching, WatchingAll

STRAGGLE_S = 0.05
"""How long the answer for several waits for the rest once the first of them are decided: one that waits for a source
must not hold back what the others' callers want to know."""


class Outcomes:
    """For one replica's callers."""

    def __init__(self, store: Records, watch: Watch, clock: Clock) -> None:
        self._store = store
        self._watch = watch
        self._clock = clock

    async def of_one(self, stored: Stored, new: New, watching: Watching, wait_s: float) -> Snapshot | None:
        """The application when nothing more comes by itself; None where the wait was over before, as is normal."""
        try:
            async with asyncio.timeout(wait_s):
                if stored.existed:
                    return await self._no_longer_pending(new.lender, stored.id)
                while not isinstance(result := await watching.next_change(), Decided):
                    # Changed elsewhere, by another replica or its applicant; or nothing comes without the applicant.
                    if result is None or isinstance(result, Awaiting | Parked):
                        try:
                            snapshot = await self._store.get(new.lender, stored.id)
                        except asyncio.CancelledError:
                            watching.tell(None)  # Still to be read, by who waits on.
                            raise
                        if snapshot.state != State.PENDING:
                            return snapshot
        except (TimeoutError, DependencyDown):  # The wait is over, or this replica is leaving.
            return None
        return _decided(new, result)

    async def of_all(self, news: Mapping[str, New], watching: WatchingAll, wait_s: float) -> dict[str, Snapshot]:
        """Those of `news`, by id, that nothing more comes of by itself; the others are pending still.

        Ends when that is all of them, after `wait_s`, or STRAGGLE_S after the first.
        """
        found: dict[str, Snapshot] = {}
        ends_at = self._clock.monotonic() + wait_s
        try:
            while len(found) < len(news):
                async with asyncio.timeout(ends_at - self._clock.monotonic()):
                    changes = await watching.next_changes()
                    decided = {key: one for key, one in changes.items() if isinstance(one, Decided)}
                    found |= {key: _decided(news[key], one) for key, one in decided.items()}
                    # As above; what was deferred stays pending, and is not looked at.
                    unread = [key for key, one in changes.items() if one is None or isinstance(one, Awaiting | Parked)]
                    try:
                        read = await self._store.get_many(unread)
                    except BaseException:
                        watching.tell_again(unread)  # Still to be read, by who waits on.
                        raise
                    found |= {key: one for key, one in read.items() if one.state != State.PENDING}
                if found:  # Later ones do not move it: their end would be later.
                    ends_at = min(ends_at, self._clock.monotonic() + STRAGGLE_S)
        except (TimeoutError, DependencyDown):
            pass
        return found

    async def changes(self, lender: str, application_id: str) -> AsyncIterator[Snapshot]:
        """The application as it is, then after each change until it is final."""
        with self._watch(application_id) as watching:
            revision = 0
            while True:
                snapshot = await self._store.get(lender, application_id)
                if snapshot.revision > revision:
                    revision = snapshot.revision
                    yield snapshot
                if snapshot.state in FINAL:
                    return
                await watching.next_change()

    async def _no_longer_pending(self, lender: str, application_id: str) -> Snapshot | None:
        async for snapshot in self.changes(lender, application_id):
            if snapshot.state != State.PENDING:
                return snapshot
        return None


def _decided(new: New, result: Decided) -> Snapshot:
    """A new application as its decision, committed a moment ago, left it."""
    return Snapshot(
        id=new.id, lender=new.lender, payload=new.payload, state=State.DECIDED, not_before=new.created_at,
        waiting_for=(), missing=(), due_at=result.due_at, assessment=result.claim.assessment, accepted_offer="",
        revision=result.claim.revision + 1, created_at=new.created_at, updated_at=result.decided_at,
        decision=result.decision, priority=new.priority,
    )  # fmt: skip
