"""Which of many applications an earlier run got acknowledged, kept in a file, so that a crashed run goes on.

An SQLite file: a commit a batch, flushed to disk (`synchronous=FULL`), and looked up on disk, so that a million
entries take no memory and a crash in the middle of a write leaves none of it. Entries are added, never changed. It
holds digests and names of applications, no identities; it may be deleted when the run is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import Message

T = TypeVar("T")


class Journal:
    """The file of one lender and client. Used by one run at a time; a second one only does work twice."""

    def __init__(self, path: Path, lender: str, client_id: str, new_id: Callable[[], str]) -> None:
        """Open it, or begin one. Raises ValueError where the file is another's, or no journal at all."""
        # One thread, so that nothing overlaps: whoever is cancelled leaves work that still runs, and two threads in
        # one SQLite connection, of which one closes it, end the process.
        self._thread = ThreadPoolExecutor(1, "loanmesh-journal")
        try:
            # Whose applications were sent is nobody's business: the file is its owner's, as those beside it are.
            path.touch(mode=0o600, exist_ok=True)
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA journal_mode=WAL")
            self._file.execute("PRAGMA synchronous=FULL")
            self._file.execute("CREATE TABLE IF NOT EXISTS run (id TEXT, lender TEXT, client_id TEXT)")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS acknowledged"
                " (request_id TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID"
            )
            self._file.execute(
                "INSERT INTO run SELECT ?, ?, ? WHERE NOT EXISTS (SELECT 1 FROM run)", (new_id(), lender, client_id)
            )
            self._run, *owner = self._file.execute("SELECT id, lender, client_id FROM run").fetchone()
        except (sqlite3.DatabaseError, OSError) as error:
            raise ValueError(f"{path} is no file to resume from ({error}); name another") from error
        if owner != [lender, client_id]:
            self._file.close()
            raise ValueError(f"{path} belongs to {owner[0]} and client {owner[1]}; name another file for this run")

    def request_id(self, application: Message) -> str:
        """The same for the same application in each run on this file, so that a repeated run sends nothing anew."""
        said = hashlib.blake2b(self._run.encode(), digest_size=16)
        said.update(application.SerializeToString(deterministic=True))
        return f"many-{said.hexdigest()}"

    async def names(self, request_ids: Sequence[str]) -> dict[str, str]:
        """Names of those that were acknowledged, by request_id."""

        def look() -> dict[str, str]:
            marks = ",".join("?" * len(request_ids))
            found = self._file.execute(
                f"SELECT request_id, name FROM acknowledged WHERE request_id IN ({marks})", request_ids
            )
            return dict(found.fetchall())

        return await self._off_loop(look)

    async def add(self, names: Sequence[tuple[str, str]]) -> None:
        """Remember (request_id, name) pairs; they are on disk when this returns."""

        def write() -> None:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.executemany("INSERT OR IGNORE INTO acknowledged VALUES (?, ?)", names)

        await self._off_loop(write)

    async def close(self) -> None:
        """Close the file, after what is under way."""
        await self._off_loop(self._file.close)
        self._thread.shutdown(wait=False)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
