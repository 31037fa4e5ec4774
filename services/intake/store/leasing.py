"""Leases: who works on which application, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from loanmesh.runtime.database import Row, Script, Statement
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.sealed import Unsealable
from services.intake.application import Claim
from services.intake.held import AGED_SHARE
from services.intake.ports import Broken, Parked
from services.intake.store.settling import Settling

_CLAIM = """
UPDATE application SET owner = ?, fence = fence + 1, attempts = attempts + 1, lease_until = {now} + ?,
  lost_lease = COALESCE(owner || '@' || CAST(lease_until AS TEXT), '')
WHERE id IN (SELECT id FROM application
  WHERE state = 'PENDING' AND not_before <= {now} AND (owner IS NULL OR lease_until < {now})
  ORDER BY {order} LIMIT ? {skip_locked})
RETURNING id, lender, fence, assessment, attempts, revision, event_hash, payload, waiting_for, created_at, priority,
  not_before, traceparent, faults, original IS NOT NULL, lost_lease, key_id, data_key"""
_CLAIM_URGENT = _CLAIM.replace("{order}", "priority, not_before")
_CLAIM_OLDEST = _CLAIM.replace("{order}", "not_before")
_RENEW = """
UPDATE application SET lease_until = {now} + ? WHERE id = ? AND fence = ? AND owner = ? AND state = 'PENDING'
RETURNING id"""
_LATER = """
UPDATE application SET owner = NULL, lease_until = NULL, not_before = {now} + ?
WHERE id = ? AND fence = ? AND owner = ?"""
_RELEASE = "UPDATE application SET owner = NULL, lease_until = NULL WHERE id = ? AND fence = ? AND owner = ?"
UNREADABLE_DUE_S = 86_400.0
"""By when somebody should have looked at an application that cannot be read, seconds."""
KEY_AWAY_S = 10.0
"""After how long an application is tried again whose key is not here, seconds: this replica may have read it by then,
or another one takes it."""
log = structlog.get_logger()


class Leasing(Settling):
    """Hands out leases on open applications, and takes them back; settles what it finds unreadable."""

    _aged = 0.0
    """Carried from one claim to the next: how much of a lease is owed to the oldest."""

    async def claim(self, at_most: int) -> list[Claim]:
        """Lease open applications that nobody holds: most urgent class first, but one in five by age alone."""
        # The rest is carried on: a replica that is nearly full asks for a few at a time.
        self._aged += at_most / AGED_SHARE
        by_age = int(self._aged)
        self._aged -= by_age

        def script() -> Script[list[Row]]:
            rows = yield Statement(_CLAIM_URGENT, [(self._owner, self._lease_s, at_most - by_age)])
            if by_age and len(rows) == at_most - by_age:
                rows += yield Statement(_CLAIM_OLDEST, [(self._owner, self._lease_s, by_age)])
            return rows

        claims: list[Claim] = []
        broken: list[Parked] = []
        later: list[Row] = []
        for row in await self._database.run(script):
            claimed = self._claimed(row)
            if isinstance(claimed, Claim):
                claims.append(claimed)
            elif claimed:
                broken.append(claimed)
            else:
                later.append((KEY_AWAY_S, row[0], row[2], self._owner))
        try:
            if broken:
                committed = await self.settle(broken)
                self._told([parked for parked in broken if parked.claim.id in committed])
            if later:
                later.sort(key=lambda row: str(row[1]))
                await self._database.run(lambda: _do(Statement(_LATER, later)))
        except DependencyDown as error:  # Their leases end by themselves; the others need not wait for it.
            log.warning("unreadable_not_put_aside", error=str(error))
        return sorted(claims, key=lambda claim: (claim.priority, claim.not_before))

    def _claimed(self, row: Row) -> Claim | Parked | None:
        """A claimed row as the pipeline takes it; it must not hold up the others where it cannot be read.

        Parked where it never can be. None while a key is not here: it is to be tried again.
        """
        application_id, lender, key_id, wrapped = row[0], row[1], row[16], row[17]
        try:
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            payload = cover.unseal(row[7], "payload")
        except DependencyDown as error:
            log.error("application_unreadable", application=application_id, error=str(error))
            return None
        except Unsealable as error:
            log.error("application_unreadable", application=application_id, error=str(error))
            at = self._clock.now().timestamp()
            claim = Claim(*(*row[:7], b"", *row[8:16]))
            return Parked(claim, "open", Broken("unsealable", "Unsealable"), at + UNREADABLE_DUE_S, at)
        return Claim(*(*row[:7], payload, *row[8:16], cover))

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Hold on to leases; the ids that are still ours."""

        def script() -> Script[set[str]]:
            rows = [(self._lease_s, claim.id, claim.fence, self._owner) for claim in _in_order(claims)]
            return {row[0] for row in (yield Statement(_RENEW, rows))}

        return await self._database.run(script)

    async def release(self, claims: Sequence[Claim]) -> None:
        """Give leases back, so that others need not wait for them to end."""

        def script() -> Script[None]:
            yield Statement(_RELEASE, [(claim.id, claim.fence, self._owner) for claim in _in_order(claims)])

        await self._database.run(script)


def _in_order(claims: Sequence[Claim]) -> list[Claim]:
    """By id, as whoever changes several rows takes them: else two transactions can wait for each other's rows."""
    return sorted(claims, key=lambda claim: claim.id)


def _do(statement: Statement) -> Script[None]:
    yield statement
