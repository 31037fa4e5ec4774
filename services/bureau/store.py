"""Bureau's cache on disk, with the newest in memory before it. The only SQL here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import structlog

from loanmesh.runtime.batching import Batcher
from loanmesh.runtime.database import Database, Script, Statement
from loanmesh.runtime.errors import DependencyDown
from services.bureau.gather import Key
from services.bureau.profile import Answer

_PUT = """
INSERT INTO source_answer (lender, subject_hash, source, answer, fetched_at) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (lender, subject_hash, source) DO UPDATE SET answer = excluded.answer, fetched_at = excluded.fetched_at
WHERE excluded.fetched_at > source_answer.fetched_at"""
_GET = "SELECT lender, subject_hash, source, answer FROM source_answer WHERE subject_hash IN ({marks})"
IN_MEMORY_MAX = 50_000
log = structlog.get_logger()


class AnswerStore:
    """A cache: losing it costs a query, never a decision. So a broken disk is reported, and gathering goes on."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._memory: OrderedDict[Key, Answer] = OrderedDict()
        self._writes: Batcher[tuple[Key, Answer], None] = Batcher(self._write, max_items=256, max_waiting=10_000)

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        """What is known of the keys."""
        known = {key: self._memory[key] for key in keys if key in self._memory}
        subjects = sorted({key[1] for key in keys if key not in known})
        if subjects:
            marks = ", ".join("?" * len(subjects))
            try:
                rows = await self._database.read(_GET.format(marks=marks), subjects)
            except DependencyDown as error:
                log.warning("cache_unreadable", error=str(error))
                rows = []
            for lender, subject, source, text in rows:
                self._remember((lender, subject, source), Answer.from_json(text))
        return {key: self._memory[key] for key in keys if key in self._memory}

    async def put(self, key: Key, answer: Answer) -> None:
        """Keep an answer; returns when it is on disk, or when the disk refused it and that was reported."""
        self._remember(key, answer)
        try:
            await self._writes.submit((key, answer))
        except DependencyDown as error:
            log.warning("cache_unwritable", error=str(error))

    def _remember(self, key: Key, answer: Answer) -> None:
        held = self._memory.get(key)
        if held is None or held.fetched_at <= answer.fetched_at:
            self._memory[key] = answer
            self._memory.move_to_end(key)
        while len(self._memory) > IN_MEMORY_MAX:
            self._memory.popitem(last=False)

    async def _write(self, batch: Sequence[tuple[Key, Answer]]) -> Sequence[None]:
        def script() -> Script[None]:
            yield Statement(
                _PUT, [(*key, answer.to_json(), answer.fetched_at) for key, answer in sorted(batch, key=lambda b: b[0])]
            )

        await self._database.run(script)
        return [None] * len(batch)
