"""One application, its history and its evidence, as they are stored."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence

import structlog

from loanmesh.runtime.database import Row
from loanmesh.runtime.errors import DependencyDown, NotFound, WrongState
from loanmesh.runtime.sealed import Unsealable
from services.intake.application import Happening, Snapshot, State
from services.intake.privacy import PARTS, part_of
from services.intake.store.part import Part

SNAPSHOT = """
SELECT a.id, a.lender, a.payload, a.state, a.not_before, a.waiting_for, a.missing, a.due_at, a.assessment,
  a.accepted_offer, a.revision, a.created_at, a.updated_at, d.payload, a.priority,
  a.erased_at, a.key_id, a.data_key
FROM application a LEFT JOIN decision d ON d.application_id = a.id AND d.assessment = a.assessment """
_EVENTS = """
SELECT seq, kind, at, actor, details, hash FROM event WHERE application_id = ? AND seq > ? ORDER BY seq LIMIT ?"""
INLINE_MAX = 200
"""Rows that may be read while the loop waits: a fraction of a millisecond."""
PARAMETERS_MAX = 5000
"""Parameters of one statement; both databases allow about six times as many."""
log = structlog.get_logger()


class Reading(Part):
    """Reads applications whose ids are known."""

    async def get(self, lender: str, application_id: str) -> Snapshot:
        """One application. Raises NotFound, WrongState where it can no longer be read."""
        return self._snapshot(await self._one(lender, application_id))

    async def changed(self, lender: str, application_id: str) -> Snapshot:
        """One application as a change left it; without its content where that cannot be read. Raises NotFound."""
        try:
            return await self.get(lender, application_id)
        except (WrongState, DependencyDown):
            row = await self._one(lender, application_id)
            return self._unsealed((*row[:2], b"", *row[3:13], None, *row[14:16], None, None))

    async def _one(self, lender: str, application_id: str) -> Row:
        rows = await self._database.read(SNAPSHOT + "WHERE a.id = ? AND a.lender = ?", (application_id, lender))
        if not rows:
            raise unknown(lender, application_id)
        return rows[0]

    async def submitted(self, lender: str, application_id: str) -> bytes:
        """The payload as it was first submitted. Raises NotFound, WrongState where it can no longer be read."""
        sql = "SELECT payload, original, key_id, data_key FROM application WHERE id = ? AND lender = ?"
        rows = await self._database.read(sql, (application_id, lender))
        if not rows:
            raise unknown(lender, application_id)
        payload, original, key_id, wrapped = rows[0]
        with readable(lender, application_id):
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            return cover.unseal(payload, "payload") if original is None else cover.unseal(original, "original")

    async def get_many(self, ids: Sequence[str]) -> dict[str, Snapshot]:
        """Those of the given applications that exist and can be read now; `get` says why another cannot."""
        if not ids:
            return {}
        marks = ", ".join("?" * len(ids))
        rows = await self._database.read(SNAPSHOT + f"WHERE a.id IN ({marks})", tuple(ids))
        found = {}
        for row in rows:
            try:
                found[row[0]] = self._snapshot(row)
            except (WrongState, DependencyDown) as error:
                log.error("application_unreadable", application=row[0], error=str(error))
        return found

    async def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Newest revision of each, for watchers."""
        found: dict[str, int] = {}
        for start in range(0, len(ids), PARAMETERS_MAX):
            some = ids[start : start + PARAMETERS_MAX]
            marks = ", ".join("?" * len(some))
            read = self._database.read if len(some) <= INLINE_MAX else self._database.scan
            rows = await read(f"SELECT id, revision FROM application WHERE id IN ({marks})", some)
            found.update((row[0], row[1]) for row in rows)
        return found

    async def events(self, lender: str, application_id: str) -> list[Happening]:
        """The whole history, oldest first. Raises NotFound."""
        if not await self._database.read(
            "SELECT 1 FROM application WHERE id = ? AND lender = ?", (application_id, lender)
        ):
            raise unknown(lender, application_id)
        rows = await self._database.read(_EVENTS, (application_id, 0, 100_000))
        return [Happening(r[0], r[1], r[2], r[3], json.loads(r[4]), r[5]) for r in rows]

    async def decision_with_evidence(
        self, lender: str, application_id: str, assessment: int
    ) -> tuple[bytes, bytes, bytes, bytes] | None:
        """(decision, profile, score, pricing) as stored; the newest for assessment 0; None where there is none.

        Raises NotFound, WrongState where it can no longer be read.
        """
        await self.get(lender, application_id)
        rows = await self._database.read(
            "SELECT d.payload, e.profile, e.score, e.pricing, d.assessment, a.key_id, a.data_key FROM decision d"
            " JOIN evidence e ON e.application_id = d.application_id AND e.assessment = d.assessment"
            " JOIN application a ON a.id = d.application_id"
            " WHERE d.application_id = ? AND (? = 0 OR d.assessment = ?) ORDER BY d.assessment DESC LIMIT 1",
            (application_id, assessment, assessment),
        )
        if not rows:
            return None
        *blobs, decided, key_id, wrapped = rows[0]
        with readable(lender, application_id):
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            decision, profile, score, pricing = (
                cover.unseal(blob, part_of(decided, column)) for blob, column in zip(blobs, PARTS, strict=True)
            )
        return decision, profile, score, pricing

    def _snapshot(self, row: Row) -> Snapshot:
        with readable(row[1], row[0]):
            return self._unsealed(row)

    def _unsealed(self, row: Row) -> Snapshot:
        cover = self._privacy.stored(row[1], row[0], row[16], row[17])
        # An erased decision is an empty row, which keeps it the only one of its assessment.
        decision = cover.unseal(row[13], part_of(row[8], "decision")) if row[13] else None
        return Snapshot(
            id=row[0], lender=row[1], payload=cover.unseal(row[2], "payload"), state=State(row[3]), not_before=row[4],
            waiting_for=tuple(json.loads(row[5])), missing=tuple(json.loads(row[6])), due_at=row[7], assessment=row[8],
            accepted_offer=row[9], revision=row[10], created_at=row[11], updated_at=row[12], decision=decision,
            priority=row[14], erased_at=row[15],
        )  # fmt: skip


def unknown(lender: str, application_id: str) -> NotFound:
    """The error for an id that the lender has not."""
    return NotFound(f"there is no {lender}/applications/{application_id}")


@contextlib.contextmanager
def readable(lender: str, application_id: str) -> Iterator[None]:
    """Raises WrongState where something of the application can no longer be read."""
    try:
        yield
    except Unsealable as error:
        raise WrongState(f"{lender}/applications/{application_id} cannot be read: {error}") from error
