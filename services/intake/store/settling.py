"""What the pipeline found, committed where its lease still holds: decided, deferred, awaiting, parked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from loanmesh.runtime.database import Script, Statement
from services.intake.application import Claim, Happening, chain
from services.intake.ports import Awaiting, Decided, Deferred, Parked, Result
from services.intake.privacy import part_of
from services.intake.store.event import INSERT_EVENT, event_row
from services.intake.store.part import SYNC, Part

# Fence and revision before the inserts: a replica that lost its lease must fail here, not later.
_DECIDE = """
UPDATE application SET state = 'DECIDED', outcome = ?, grade = ?, due_at = ?, owner = NULL, lease_until = NULL,
  waiting_for = '[]', missing = '[]', revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_AWAIT = """
UPDATE application SET state = 'AWAITING_INFORMATION', missing = ?, due_at = ?, owner = NULL, lease_until = NULL,
  waiting_for = '[]', revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_DEFER = """
UPDATE application SET owner = NULL, lease_until = NULL, waiting_for = ?,
  not_before = CASE WHEN ? = 1 THEN not_before ELSE {now} + ? END, faults = faults + ?,
  revision = revision + ?, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_PARK = """
UPDATE application SET state = 'PARKED', due_at = ?, owner = NULL, lease_until = NULL, waiting_for = '["parked"]',
  faults = faults + 1, revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_INSERT_DECISION = """
INSERT INTO decision (application_id, assessment, fence, payload, decided_at) VALUES (?, ?, ?, ?, ?)"""
_INSERT_EVIDENCE = """
INSERT INTO evidence (application_id, assessment, profile, score, pricing) VALUES (?, ?, ?, ?, ?)"""


class Settling(Part):
    """Commits results once each."""

    async def settle(self, results: Sequence[Result]) -> set[str]:
        """Commit what the pipeline found, where fence and revision still hold; the ids that were."""

        # In the order of ids, and of two leases on one application only the newer: the older is lost whatever it found.
        newest = {r.claim.id: r for r in sorted(results, key=lambda r: (r.claim.id, r.claim.fence))}
        results = list(newest.values())

        def script() -> Script[set[str]]:
            decided = yield from self._decide([r for r in results if isinstance(r, Decided)])
            deferred = yield from self._defer([r for r in results if isinstance(r, Deferred)])
            awaiting = yield from self._await([r for r in results if isinstance(r, Awaiting)])
            parked = yield from self._park([r for r in results if isinstance(r, Parked)])
            ours = decided | deferred | awaiting | parked
            if len(ours) < len(results):
                yield SYNC  # Settled before, perhaps by us: callers will be told of that.
            return ours

        return await self._database.run(script)

    def _decide(self, results: Sequence[Decided]) -> Script[set[str]]:
        events = {r.claim.id: self._next(r.claim, "decided", r.decided_at, r.details) for r in results}
        rows = [
            (
                r.outcome,
                r.grade,
                r.due_at,
                events[r.claim.id].hash,
                r.decided_at,
                r.claim.id,
                r.claim.fence,
                r.claim.revision,
            )
            for r in results
        ]
        ours = {row[0] for row in (yield Statement(_DECIDE, rows))}
        won = [r for r in results if r.claim.id in ours]
        sealed = [(r.claim, r, self._seals(r.claim)) for r in won]
        yield Statement(
            _INSERT_DECISION,
            [(c.id, c.assessment, c.fence, seal(r.decision, "decision"), r.decided_at) for c, r, seal in sealed],
        )
        yield Statement(
            _INSERT_EVIDENCE,
            [
                (c.id, c.assessment, seal(r.profile, "profile"), seal(r.score, "score"), seal(r.pricing, "pricing"))
                for c, r, seal in sealed
            ],
        )
        yield from _record(events, ours)
        return ours

    def _seals(self, claim: Claim) -> Callable[[bytes, str], bytes]:
        """What seals the content of one assessment."""
        if (cover := claim.cover) is None:
            raise ValueError(f"the claim on {claim.id} says not how its content is kept: no store made it")
        return lambda plain, column: cover.seal(plain, part_of(claim.assessment, column))

    def _await(self, results: Sequence[Awaiting]) -> Script[set[str]]:
        events = {
            r.claim.id: self._next(r.claim, "awaiting_information", r.at, {"missing": _names(r.missing)})
            for r in results
        }
        rows = [
            (
                json.dumps(r.missing),
                r.due_at,
                events[r.claim.id].hash,
                r.at,
                r.claim.id,
                r.claim.fence,
                r.claim.revision,
            )
            for r in results
        ]
        ours = {row[0] for row in (yield Statement(_AWAIT, rows))}
        yield from _record(events, ours)
        return ours

    def _defer(self, results: Sequence[Deferred]) -> Script[set[str]]:
        # An event only when the cause changes: a source that is dead for hours must not fill the history.
        events = {
            r.claim.id: self._next(r.claim, "deferred", r.at, {"waiting_for": ",".join(r.waiting_for)})
            for r in results
            if json.dumps(r.waiting_for) != r.claim.waiting_for
        }
        rows = []
        for r in results:
            event = events.get(r.claim.id)
            rows.append(
                (json.dumps(r.waiting_for), 1 if r.overloaded else 0, r.retry_s,
                 1 if r.broke else 0, 1 if event else 0, event.hash if event else r.claim.event_hash, r.at,
                 r.claim.id, r.claim.fence, r.claim.revision)
            )  # fmt: skip
        ours = {row[0] for row in (yield Statement(_DEFER, rows))}
        yield from _record(events, ours)
        return ours

    def _park(self, results: Sequence[Parked]) -> Script[set[str]]:
        if not results:
            return set()
        events = {
            r.claim.id: self._next(r.claim, "parked", r.at, {
                "cause": r.broken.cause, "stage": r.stage, "error_type": r.broken.error_type,
                "faults": str(r.claim.faults + 1), "trace_id": r.claim.trace_id,
            })
            for r in results
        }  # fmt: skip
        rows = [(r.due_at, events[r.claim.id].hash, r.at, r.claim.id, r.claim.fence, r.claim.revision) for r in results]
        ours = {row[0] for row in (yield Statement(_PARK, rows))}
        yield from _record(events, ours)
        return ours

    def _next(self, claim: Claim, kind: str, at: float, details: dict[str, str]) -> Happening:
        event = Happening(claim.revision + 1, kind, at, self._owner, details)
        return Happening(event.seq, kind, at, self._owner, details, chain(claim.event_hash, claim.id, event))


def _record(events: dict[str, Happening], ours: set[str]) -> Script[None]:
    yield Statement(INSERT_EVENT, [event_row(key, event, event.hash) for key, event in events.items() if key in ours])


def _names(missing: Sequence[dict[str, str]]) -> str:
    return ",".join(":".join(filter(None, (m["field"], m["source"]))) for m in missing)
