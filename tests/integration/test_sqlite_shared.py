"""Several replicas on one SQLite file: they start at once, write at once, and wait for each other."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from loanmesh.runtime.database import Script, SqliteDatabase, Statement
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.migrations import upgrade


def test_replicas_that_start_at_once_make_the_tables_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        for number in range(8):
            url = f"sqlite:///{tmp_path / f'{number}.db'}"
            for done in [pool.submit(upgrade, url, "services.intake") for _ in range(4)]:
                done.result()


async def test_a_replica_opens_a_file_that_another_is_just_making(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")  # Not in WAL mode yet: turning it on does not wait by itself.
    threading.Timer(0.2, other.execute, ["COMMIT"]).start()
    await SqliteDatabase(path).close()
    other.close()


async def test_a_writer_waits_for_another_process_and_then_writes(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    ours = SqliteDatabase(path)
    await ours.run(lambda: _statement("CREATE TABLE seen (n INTEGER)"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(ours.run(lambda: _statement("INSERT INTO seen VALUES (1)")))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(writing), 0.3)
    other.execute("COMMIT")
    await writing
    assert await ours.read("SELECT n FROM seen") == [(1,)]
    other.close()
    await ours.close()


async def test_a_writer_that_waited_in_vain_says_so_and_writes_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loanmesh.runtime.database.BUSY_S", 0.2)
    path = tmp_path / "shared.db"
    ours = SqliteDatabase(path)
    await ours.run(lambda: _statement("CREATE TABLE seen (n INTEGER)"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DependencyDown, match="locked"):
        await ours.run(lambda: _statement("INSERT INTO seen VALUES (1)"))
    other.execute("COMMIT")
    await ours.run(lambda: _statement("INSERT INTO seen VALUES (2)"))
    assert await ours.read("SELECT n FROM seen") == [(2,)]
    other.close()
    await ours.close()


async def test_whatever_goes_wrong_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SqliteDatabase(tmp_path / "a.db")
    await ours.run(lambda: _statement("CREATE TABLE seen (n INTEGER)"))

    async def cannot(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ours, "_on_disk", cannot)
        with pytest.raises(DependencyDown, match="can't start new thread"):
            await ours.run(lambda: _statement("INSERT INTO seen VALUES (1)"))
    await ours.run(lambda: _statement("INSERT INTO seen VALUES (2)"))
    assert await ours.read("SELECT n FROM seen") == [(2,)], "what was not committed is gone, and the next is written"
    await ours.close()
    with pytest.raises(DependencyDown, match="closed"):
        await ours.run(lambda: _statement("INSERT INTO seen VALUES (3)"))


def _statement(sql: str) -> Script[None]:
    yield Statement(sql)
