"""Spans and logs in one SQLite file, bounded by age and size. The only SQL here; written by the sink alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loanmesh.runtime import semconv
from loanmesh.seeing.spans import CannotRead, Event, Log, Span

T = TypeVar("T")
FILE = "traces.db"
"""In the state folder of `up`."""
READ_MAX = 200_000
"""Most spans that one question reads."""
NEARBY_MAX = 50
"""Most lines of other traces that are shown beside one."""
_SCHEMA = """
PRAGMA auto_vacuum=INCREMENTAL;
PRAGMA journal_mode=WAL;
CREATE TABLE IF NOT EXISTS span (trace_id TEXT, span_id TEXT, parent_id TEXT, name TEXT, service TEXT, instance TEXT,
  kind TEXT, began REAL, ended REAL, error TEXT, application TEXT, attributes TEXT, events TEXT,
  PRIMARY KEY (trace_id, span_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS span_application ON span (application) WHERE application != '';
CREATE INDEX IF NOT EXISTS span_ended ON span (ended);
CREATE TABLE IF NOT EXISTS log (at REAL, trace_id TEXT, service TEXT, instance TEXT, level TEXT, event TEXT,
  attributes TEXT);
CREATE INDEX IF NOT EXISTS log_at ON log (at);
CREATE INDEX IF NOT EXISTS log_trace ON log (trace_id) WHERE trace_id != '';
CREATE TABLE IF NOT EXISTS process (instance TEXT PRIMARY KEY, service TEXT, seen REAL);
"""
# The same span may be told by its process and, where that seemed gone, by another: who knows its length is right.
_INSERT_SPAN = """
INSERT INTO span VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (trace_id, span_id) DO UPDATE SET
  parent_id = excluded.parent_id, service = excluded.service, instance = excluded.instance, began = excluded.began,
  ended = excluded.ended, error = excluded.error, attributes = excluded.attributes, events = excluded.events
  WHERE excluded.ended - excluded.began > span.ended - span.began"""
_COLUMNS = "trace_id, span_id, parent_id, name, service, instance, kind, began, ended, error, attributes, events"


class TraceFile:
    """The sink's side: writes. One thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            # Not a database any more, after a power cut: traces are no evidence, so a new file is better than none.
            self._path.replace(self._path.with_suffix(".broken"))
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        made = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
        made.executescript(_SCHEMA)
        made.execute("PRAGMA synchronous=OFF")  # Losing the last second of traces in a power cut harms nobody.
        return made

    def write(self, spans: Iterable[Span], logs: Iterable[Log], seen: Mapping[str, tuple[str, float]]) -> None:
        """Keep all in one transaction. Raises sqlite3.Error where the disk does not take it; then nothing is kept.

        seen  by a process's name, its service and when it told something.
        """
        with self._db:
            self._db.executemany(_INSERT_SPAN, [_row(span) for span in spans])
            self._db.executemany(
                "INSERT INTO log VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(one.at, one.trace_id, one.service, one.instance, one.level, one.event,
                  json.dumps(dict(one.attributes), ensure_ascii=False)) for one in logs],
            )  # fmt: skip
            self._db.executemany(
                "INSERT INTO process VALUES (?, ?, ?) ON CONFLICT (instance) DO UPDATE SET seen = excluded.seen",
                [(name, service, at) for name, (service, at) in seen.items()],
            )

    def trim(self, now: float, keep_s: float, keep_bytes: int) -> None:
        """Forget what is too old, and the oldest where the file is too large."""
        oldest = now - keep_s
        while True:
            with self._db:
                self._db.execute("DELETE FROM span WHERE ended < ?", (oldest,))
                self._db.execute("DELETE FROM log WHERE at < ?", (oldest,))
                self._db.execute("DELETE FROM process WHERE seen < ?", (oldest,))
            self._db.execute("PRAGMA incremental_vacuum").fetchall()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            if self.size_bytes <= keep_bytes:
                return
            first, last = self._db.execute("SELECT min(ended), max(ended) FROM span").fetchone()
            if first is None or first >= last:
                with self._db:
                    self._db.execute("DELETE FROM log")
                    self._db.execute("DELETE FROM span")
                self._db.execute("PRAGMA incremental_vacuum").fetchall()
                return
            oldest = first + (last - first) / 4

    @property
    def size_bytes(self) -> int:
        """Of the file's pages in use."""
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


class KeptTraces:
    """The reader's side (see Traces): opens the file for each question, so that the sink may come and go."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def of_application(self, application_id: str) -> list[Span]:
        """See Traces."""
        where = "trace_id IN (SELECT trace_id FROM span WHERE application = ?) ORDER BY began LIMIT ?"
        return await self._spans(where, application_id, READ_MAX)

    async def of_trace(self, trace_id: str) -> list[Span]:
        """See Traces."""
        return await self._spans("trace_id = ? ORDER BY began LIMIT ?", trace_id, READ_MAX)

    async def since(self, at: float) -> list[Span]:
        """See Traces."""
        # Sampled traces in which all was well are left out here, so that they need not be read.
        where = (
            "trace_id IN (SELECT trace_id FROM span WHERE ended >= ? AND (error != '' OR"
            f" json_extract(attributes, '$.\"{semconv.KEPT_FOR}\"') NOT IN ('sampled'))) ORDER BY began LIMIT ?"
        )
        return await self._spans(where, at, READ_MAX)

    async def logs(self, trace_id: str, began: float, ended: float) -> list[Log]:
        """See Traces."""

        def read(db: sqlite3.Connection) -> list[Log]:
            rows = db.execute(
                "SELECT * FROM (SELECT * FROM log WHERE trace_id = ? ORDER BY at LIMIT 1000) UNION SELECT * FROM"
                " (SELECT * FROM log WHERE at BETWEEN ? AND ? AND level NOT IN ('debug', 'info') ORDER BY at LIMIT ?)"
                " ORDER BY 1",
                (trace_id, began, ended, NEARBY_MAX),
            )
            return [_log(row) for row in rows]

        return await self._read(read)

    async def last_seen(self) -> Mapping[str, float]:
        """See Traces."""
        return await self._read(lambda db: dict(db.execute("SELECT instance, seen FROM process").fetchall()))

    async def _spans(self, where: str, *parameters: object) -> list[Span]:
        def read(db: sqlite3.Connection) -> list[Span]:
            return [_span(row) for row in db.execute(f"SELECT {_COLUMNS} FROM span WHERE {where}", parameters)]

        return await self._read(read)

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        def work() -> T:
            if not self._path.exists():
                raise CannotRead(
                    f"no traces are kept in {self._path}; `loanmesh up` keeps them, --state names its folder,"
                    " --jaeger asks a Jaeger"
                )
            try:
                with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=5)) as db:
                    return read(db)
            except sqlite3.Error as error:
                raise CannotRead(f"{self._path} cannot be read: {error}") from error

        return await asyncio.to_thread(work)


def _row(span: Span) -> tuple[Any, ...]:
    events = json.dumps([[e.at, e.name, dict(e.attributes)] for e in span.events], ensure_ascii=False)
    return (
        span.trace_id, span.span_id, span.parent_id, span.name, span.service, span.instance, span.kind, span.began,
        span.ended, span.error, span.application, json.dumps(dict(span.attributes), ensure_ascii=False), events,
    )  # fmt: skip


def _span(row: Sequence[Any]) -> Span:
    *plain, attributes, events = row
    names = ("trace_id", "span_id", "parent_id", "name", "service", "instance", "kind", "began", "ended", "error")
    said = dict(zip(names, plain, strict=True))
    return Span(**said, attributes=json.loads(attributes), events=tuple(Event(*event) for event in json.loads(events)))


def _log(row: Sequence[Any]) -> Log:
    at, trace_id, service, instance, level, event, attributes = row
    return Log(at, trace_id, service, instance, level, event, json.loads(attributes))
