"""Bureau's cache on disk, with the newest in memory before it. The only SQL here."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence

import structlog

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import Database, Row, Script, Statement
from loanmesh.runtime.errors import NotNow
from loanmesh.runtime.sealed import Sealer, Unsealable
from services.bureau.gather import Key
from services.bureau.keeping import sealed, unsealed
from services.bureau.profile import Answer

_PUT = """
INSERT INTO source_answer (lender, subject_hash, source, answer, sealed, key_id, fetched_at)
VALUES (?, ?, ?, '', ?, ?, ?)
ON CONFLICT (lender, subject_hash, source) DO UPDATE SET
  answer = '', sealed = excluded.sealed, key_id = excluded.key_id, fetched_at = excluded.fetched_at
WHERE excluded.fetched_at > source_answer.fetched_at"""
# By lender first, as the primary key is: without it each look would read the whole table.
_GET = """
SELECT subject_hash, source, answer, sealed, key_id FROM source_answer
WHERE lender = ? AND subject_hash IN ({marks})"""
_PURGE = "DELETE FROM source_answer WHERE fetched_at < ?"
_COUNT = "SELECT source FROM source_answer WHERE lender = ? AND subject_hash = ?"
_ERASE = "DELETE FROM source_answer WHERE lender = ? AND subject_hash = ? RETURNING source"
_NOTE_ERASED = """
INSERT INTO erasure (lender, subject_hash, erased_at) VALUES (?, ?, ?)
ON CONFLICT (lender, subject_hash) DO UPDATE SET erased_at = excluded.erased_at"""
_ERASED = "SELECT lender, subject_hash, erased_at FROM erasure WHERE erased_at >= ?"
_ERASE_LATECOMERS = "DELETE FROM source_answer WHERE lender = ? AND subject_hash = ? AND fetched_at <= ?"
_FORGET_NOTES = "DELETE FROM erasure WHERE erased_at < ?"
NOTED_S = 3600.0
"""How long an erasure is noted after all replicas should have seen it: clocks differ, and replicas sleep."""
IN_MEMORY_MAX = 50_000
WAITING_MAX = 10_000
"""Answers that wait for the disk; beyond, the oldest is dropped: it costs a query later."""
BATCH_MAX = 256
WRITE_AFTER_S = 0.1
"""How long an answer waits for others to be written with: a commit costs more than the answers in it."""
log = structlog.get_logger()


class AnswerStore:
    """A cache: losing it costs a query, never a decision. So a broken disk is reported, and gathering goes on."""

    def __init__(self, database: Database, clock: Clock, sealer: Sealer) -> None:
        self._database = database
        self._clock = clock
        self._sealer = sealer
        self._memory: OrderedDict[Key, Answer] = OrderedDict()
        self._waiting: OrderedDict[Key, Answer] = OrderedDict()
        self._writer: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Answers that wait for the disk."""
        return len(self._waiting)

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        """What is known of the keys."""
        known: dict[Key, Answer] = {}
        unknown: dict[str, set[str]] = defaultdict(set)
        for key in keys:
            if key in self._memory:
                self._memory.move_to_end(key)
                known[key] = self._memory[key]
            else:
                unknown[key[0]].add(key[1])
        wanted = set(keys)
        for lender, subjects in unknown.items():
            for key, answer in (await self._read(lender, sorted(subjects))).items():
                self._remember(key, answer)
                if key in wanted and key not in known:
                    known[key] = self._memory.get(key, answer)
        return known

    async def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer: known at once, on disk soon after. Never waits for the disk, which may be slow."""
        self._remember(key, answer)
        self._waiting[key] = answer
        if len(self._waiting) > WAITING_MAX:
            self._waiting.popitem(last=False)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_waiting())

    async def purge(self, fetched_before: float) -> None:
        """Delete answers fetched before (seconds since 1970): what may no longer be used is not kept."""
        try:
            await self._database.run(lambda: _one(Statement(_PURGE, [(fetched_before,)])))
        except NotNow as error:
            log.warning("cache_unwritable", error=str(error))

    async def erase(self, lender: str, number: str, *, only_count: bool) -> int:
        """Delete what is cached of a subject, under whichever key it is found; how many answers. Raises DependencyDown.

        Other replicas forget what they have in memory with their next `forget_erased`.
        """
        subjects = self._sealer.subjects(lender, number)
        at = self._clock.now().timestamp()
        if not only_count:
            self._drop({(lender, subject) for subject in subjects})

        def script() -> Script[int]:
            pairs = [(lender, subject) for subject in subjects]
            if only_count:
                return len((yield Statement(_COUNT, pairs)))
            found = yield Statement(_ERASE, pairs)
            yield Statement(_NOTE_ERASED, [(*pair, at) for pair in pairs])
            return len(found)

        return await self._database.run(script)

    async def forget_erased(self, noted_since: float) -> bool:
        """Drop from memory what any replica erased since (seconds since 1970), and notes that all have seen.

        From the disk, too: a replica that was writing an answer just then did not see the erasure, nor that the answer.
        False where the notes could not be read: the next look must begin where this one did.
        """

        def script() -> Script[None]:
            yield Statement(_ERASE_LATECOMERS, sorted(rows))
            yield Statement(_FORGET_NOTES, [(noted_since - NOTED_S,)])

        try:
            rows = await self._database.scan(_ERASED, (noted_since,))
            self._drop({(row[0], row[1]) for row in rows})
            await self._database.run(script)
        except NotNow as error:
            log.warning("cache_unreadable", error=str(error))
            return False
        return True

    def _drop(self, subjects: set[tuple[str, str]]) -> None:
        if subjects:
            for held in (self._memory, self._waiting):
                for key in [key for key in held if key[:2] in subjects]:
                    del held[key]

    async def close(self) -> None:
        """Write what waits."""
        if self._writer:
            await self._writer

    async def _read(self, lender: str, subjects: Sequence[str]) -> dict[Key, Answer]:
        try:
            rows = await self._database.read(_GET.format(marks=", ".join("?" * len(subjects))), [lender, *subjects])
        except NotNow as error:
            log.warning("cache_unreadable", error=str(error))
            return {}
        found: dict[Key, Answer] = {}
        for subject, source, plain, blob, key_id in rows:
            try:
                answer = unsealed(self._sealer, (lender, subject, source), plain, blob, key_id)
            except (NotNow, Unsealable) as error:
                log.warning("cache_unreadable", error=str(error))
                continue
            found[lender, subject, source] = answer
        return found

    def _remember(self, key: Key, answer: Answer) -> None:
        held = self._memory.get(key)
        if held is None or held.fetched_at <= answer.fetched_at:
            self._memory[key] = answer
            self._memory.move_to_end(key)
        while len(self._memory) > IN_MEMORY_MAX:
            self._memory.popitem(last=False)

    async def _write_waiting(self) -> None:
        while self._waiting:
            if len(self._waiting) < BATCH_MAX:
                await self._clock.sleep(WRITE_AFTER_S)
            batch = [self._waiting.popitem(last=False) for _ in range(min(BATCH_MAX, len(self._waiting)))]
            if not batch:
                return  # All that waited was erased meanwhile.
            # In the order of the key, so that two replicas that write the same rows do not deadlock.
            rows = [
                (*key, *sealed(self._sealer, key, answer), answer.fetched_at)
                for key, answer in sorted(batch, key=lambda b: b[0])
            ]
            try:
                await self._database.run(lambda rows=rows: _put(rows))  # type: ignore[misc]
            except NotNow as error:
                log.warning("cache_unwritable", error=str(error), dropped=len(rows))


def _put(rows: Sequence[Row]) -> Script[None]:
    """Write answers, but those of before their subject was erased: by another replica, while they waited here."""
    notes = yield Statement(_ERASED, [(min(row[-1] for row in rows),)])
    erased = {(lender, subject): at for lender, subject, at in notes}
    yield Statement(_PUT, [row for row in rows if erased.get(row[:2], -1.0) < row[-1]])


def _one(statement: Statement) -> Script[None]:
    yield statement
