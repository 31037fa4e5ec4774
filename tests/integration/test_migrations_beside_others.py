"""Tables change while others use them: PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from loanmesh.runtime.migrations import OldTables, check, upgrade
from loanmesh.runtime.opening import opening
from loanmesh.runtime.setting_rules import NotReachable
from tests.databases import new_database

pytestmark = pytest.mark.postgres
INTAKE = "services.intake"
BEFORE_THE_LAST = "0004"


@pytest.fixture
async def url(postgres: str) -> str:
    url = await new_database(postgres)
    await asyncio.to_thread(upgrade, url, INTAKE, BEFORE_THE_LAST)
    return url


@pytest.fixture
async def other(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else at the same database."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def test_a_change_that_has_to_wait_gives_up_so_that_nobody_waits_behind_it(
    url: str, other: asyncpg.Connection
) -> None:
    def migrate() -> None:
        with opening("INTAKE_DATABASE_URL", url):
            upgrade(url, INTAKE, lock_s=0.1)

    async with other.transaction():
        await other.fetch("SELECT * FROM application")  # A report that takes its time.
        with pytest.raises(NotReachable, match="lock timeout"):
            await asyncio.to_thread(migrate)
        with pytest.raises(OldTables, match=f"at {BEFORE_THE_LAST}"):
            await asyncio.to_thread(check, url, INTAKE)
    await asyncio.to_thread(migrate)
    await asyncio.to_thread(check, url, INTAKE)


async def test_a_replica_may_start_while_a_migration_takes_its_time(url: str, other: asyncpg.Connection) -> None:
    await asyncio.to_thread(upgrade, url, INTAKE)
    async with other.transaction():
        await other.execute("SELECT pg_advisory_xact_lock(hashtext('loanmesh-migrations'))")
        await asyncio.wait_for(asyncio.to_thread(check, url, INTAKE), 20)
