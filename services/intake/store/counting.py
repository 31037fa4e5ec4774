"""How much waits, comes and goes: what estimates, alerts and the autoscaler stand on."""

from __future__ import annotations

import json

from services.intake.store.part import Part

_BACKLOG = """
SELECT priority, CAST(not_before AS BIGINT), count(*), count(DISTINCT owner) FROM application
WHERE state = 'PENDING' AND not_before <= {now} GROUP BY 1, 2 ORDER BY 1, 2"""
_ARRIVED = "SELECT count(*) FROM (SELECT 1 FROM application WHERE id >= ? LIMIT ?) AS came"
# A range of the index application_kept.
_DECIDED = """
SELECT count(*) FROM (
  SELECT 1 FROM application WHERE erased_at IS NULL AND state <> 'PENDING' AND state = 'DECIDED' AND updated_at >= ?
  LIMIT ?) AS went"""
# What an applicant has supplied has no place in the queue (0) until it is looked at: it waits since it was changed.
_STANDING = """
SELECT
  MAX(CASE WHEN not_before > {now} THEN 0 WHEN not_before > 0 THEN {now} - not_before ELSE {now} - updated_at END),
  MAX(CASE WHEN original IS NULL THEN {now} - created_at ELSE 0 END),
  COUNT(CASE WHEN lease_until < {now} - ? AND not_before < {now} - ? THEN 1 END),
  (SELECT COUNT(*) FROM application WHERE state = 'PARKED')
FROM application WHERE state = 'PENDING'"""
_RESTING = """
SELECT waiting_for, COUNT(*), MIN(not_before) FROM application
WHERE state = 'PENDING' AND not_before > {now} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 20"""


class Counting(Part):
    """Counts applications without reading them."""

    async def now(self) -> float:
        """The database's time of day, seconds since 1970: one clock for all replicas."""
        ((now_s,),) = await self._database.read("SELECT {now}")
        return float(now_s)

    async def backlog(self) -> list[tuple[int, int, int, int]]:
        """Applications that could be worked on now and are not decided, in the order of their turn.

        Rows of (priority, second in which they came, how many, by how many replicas they are held).
        """
        return [(row[0], row[1], row[2], row[3]) for row in await self._database.scan(_BACKLOG)]

    async def arrived(self, since: float, at_most: int) -> int:
        """How many were accepted since then, seconds since 1970, counting no further than `at_most`.

        A range of the primary key: ids begin with the time at which they were made.
        """
        milliseconds = f"{int(since * 1000):012x}"
        first = f"{milliseconds[:8]}-{milliseconds[8:]}-"
        rows = await self._database.scan(_ARRIVED, (first, at_most))
        return int(rows[0][0])

    async def decided(self, since: float, at_most: int) -> int:
        """How many were decided since then, seconds since 1970, and are so still, counting up to `at_most`."""
        rows = await self._database.scan(_DECIDED, (since, at_most))
        return int(rows[0][0])

    async def standing(self, grace_s: float) -> tuple[float, float, int, int]:
        """How long the first in line waits for its turn, seconds; how long ago the oldest that waits for us alone was
        acknowledged, seconds; how many are due and without an owner since their lease ended, both for `grace_s`; how
        many are parked.
        """
        ((backlog_s, pending_s, unowned, parked),) = await self._database.scan(_STANDING, (grace_s, grace_s))
        # The clock of whoever stored it may be ahead of the database's.
        return max(0.0, backlog_s or 0.0), max(0.0, pending_s or 0.0), unowned, parked

    async def resting(self) -> list[tuple[str, int, float]]:
        """Applications that may not be looked at yet: (what they wait for, how many, when the first may be, seconds
        since 1970), the most frequent first.
        """
        rows = await self._database.scan(_RESTING)
        return [(",".join(json.loads(waiting_for)), count, first_at) for waiting_for, count, first_at in rows]
