"""Answers as they are stored: sealed, and sealed anew after a rotation. SQL, as in `store.py`."""

from __future__ import annotations

import structlog

from loanmesh.runtime.database import Database, Script, Statement
from loanmesh.runtime.errors import NotNow
from loanmesh.runtime.sealed import Sealer, Unsealable
from services.bureau.gather import Key
from services.bureau.profile import Answer

_OLD_KEYS = """
SELECT lender, subject_hash, source, answer, sealed, key_id, fetched_at FROM source_answer
WHERE (lender, subject_hash, source) > (?, ?, ?) AND (key_id IS NULL OR key_id <> ?)
ORDER BY lender, subject_hash, source LIMIT ?"""
_RESEAL = """
UPDATE source_answer SET sealed = ?, key_id = ?, answer = ''
WHERE lender = ? AND subject_hash = ? AND source = ? AND fetched_at = ?"""
_USE = "SELECT key_id, count(*) FROM source_answer GROUP BY 1"
FIRST: Key = ("", "", "")
"""Before all answers."""
log = structlog.get_logger()


def sealed(sealer: Sealer, key: Key, answer: Answer) -> tuple[bytes, str]:
    """(blob, key id) as stored. A key is derived for each subject, so that none is used too often."""
    data_key = sealer.row_key("/".join(key[:2]))
    return data_key.seal(answer.to_json().encode(), "/".join(key)), data_key.key_id


def unsealed(sealer: Sealer, key: Key, plain: str, blob: bytes | None, key_id: str) -> Answer:
    """From how it is stored; plain, where it is from before sealing. Raises DependencyDown, Unsealable."""
    if blob is None:
        return Answer.from_json(plain)
    said = sealer.open_row_key(key_id, "/".join(key[:2])).unseal(blob, "/".join(key))
    return Answer.from_json(said.decode())


class Keeping:
    """What is done to the cache beside its use. All raise DependencyDown."""

    def __init__(self, database: Database, sealer: Sealer) -> None:
        self._database = database
        self._sealer = sealer

    async def reseal(self, after: Key, at_most: int) -> tuple[Key | None, int]:
        """Seal answers anew that are under an older key, or none: (the last looked at, None at the end; how many).

        after  go on from there. What cannot be read stays as it is, and hides nothing behind it.
        """
        rows = await self._database.scan(_OLD_KEYS, (*after, self._sealer.keys.seal().id, at_most))

        def script() -> Script[int]:
            moved = []
            for lender, subject, source, plain, blob, key_id, fetched_at in rows:
                key = (lender, subject, source)
                try:
                    answer = unsealed(self._sealer, key, plain, blob, key_id)
                except (NotNow, Unsealable) as error:
                    log.warning("cache_unreadable", error=str(error))
                    continue  # It is never served, and purged with its age.
                moved.append((*sealed(self._sealer, key, answer), *key, fetched_at))
            yield Statement(_RESEAL, moved)
            return len(moved)

        place = (rows[-1][0], rows[-1][1], rows[-1][2]) if len(rows) == at_most else None
        return place, await self._database.run(script) if rows else 0

    async def use(self) -> dict[str, int]:
        """How many answers need each sealing key, by its id; '' for those that are not sealed."""
        return {row[0] or "": row[1] for row in await self._database.scan(_USE)}
