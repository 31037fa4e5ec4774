"""PostgreSQL that deadlocks, cuts connections, and callers that give up in the middle: later, never an inner error."""

from __future__ import annotations

import asyncio
import random

import asyncpg
import pytest

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import Database, Script, Statement, open_database
from loanmesh.runtime.errors import DependencyDown
from tests.databases import new_database

pytestmark = pytest.mark.postgres


def _statements(*sql: str) -> Script[None]:
    for one in sql:
        yield Statement(one)


async def test_of_two_that_deadlock_both_are_done_once(postgres: str) -> None:
    database = await open_database(await new_database(postgres))
    await database.run(
        lambda: _statements("CREATE TABLE pair (id INT, n INT)", "INSERT INTO pair VALUES (1, 0), (2, 0)")
    )

    async def touch(first: int, second: int) -> None:
        update = "UPDATE pair SET n = n + 1 WHERE id = {}"
        await database.run(lambda: _statements(update.format(first), "SELECT pg_sleep(0.3)", update.format(second)))

    await asyncio.gather(touch(1, 2), touch(2, 1))
    assert await database.read("SELECT n FROM pair ORDER BY id") == [(2,), (2,)]
    await database.close()


async def test_callers_that_give_up_spoil_nothing_for_the_others(postgres: str) -> None:
    url = await new_database(postgres)
    database = await open_database(url)
    dice = random.Random(1)
    seen: set[type[BaseException]] = set()
    for number in range(10):
        reads = [asyncio.create_task(_read(database, dice, number * 40 + i)) for i in range(40)]
        await SystemClock().sleep(0.01)  # The statements must be under way.
        if number % 2:
            await _cut_connections(url)
        seen |= {type(o) for o in await asyncio.gather(*reads, return_exceptions=True) if isinstance(o, BaseException)}
    assert seen <= {TimeoutError, DependencyDown}
    assert TimeoutError in seen
    assert await database.read("SELECT 1") == [(1,)]
    await database.close()


async def test_reads_whose_connections_are_cut_are_answered_by_new_ones(postgres: str) -> None:
    url = await new_database(postgres)
    database = await open_database(url)
    reads = [asyncio.create_task(database.read("SELECT 'read', pg_sleep(0.5)::text")) for _ in range(4)]
    watcher = await asyncpg.connect(url)
    # New connections would pass for those that were cut: all four must be at it first.
    while await watcher.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT ''read''%'") < 4:
        await SystemClock().sleep(0.01)
    await watcher.close()
    await _cut_connections(url)
    assert await asyncio.gather(*reads) == [[("read", "")]] * 4
    await database.close()


async def test_a_read_that_is_cut_each_time_is_tried_twice_and_a_change_once(postgres: str) -> None:
    database = await open_database(await new_database(postgres))
    await database.run(lambda: _statements("CREATE SEQUENCE tries"))
    fatal = "SELECT nextval('tries'), pg_terminate_backend(pg_backend_pid())"
    with pytest.raises(DependencyDown, match="cannot be read"):
        await database.read(fatal)
    assert await database.read("SELECT last_value FROM tries") == [(2,)]
    with pytest.raises(DependencyDown, match="cannot be written"):
        await database.run(lambda: _statements(fatal))
    assert await database.read("SELECT last_value FROM tries") == [(3,)]
    await database.close()


async def _read(database: Database, dice: random.Random, number: int) -> None:
    async with asyncio.timeout(dice.uniform(0, 0.02) if dice.random() < 0.5 else 10):
        # New words, so that the driver also prepares them.
        await database.read(f"SELECT {number}, pg_sleep(0.003)::text")


async def _cut_connections(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()
