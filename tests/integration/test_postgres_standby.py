"""PostgreSQL whose standby is away: what is on one disk only is not acknowledged, however often it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import PostgresDatabase
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.migrations import upgrade
from services.intake.application import State
from services.intake.privacy import Privacy
from services.intake.store import Store
from tests.builders import a_sealer
from tests.databases import new_database
from tests.integration.test_store import CLOCK, LENDER, decided, new

pytestmark = pytest.mark.postgres
WRITE = "SELECT pg_logical_emit_message(true, 'test', '')"
WAITING = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND datname = current_database()"


@pytest.fixture
async def url(postgres: str) -> str:
    found = await new_database(postgres)
    await asyncio.to_thread(upgrade, found, "services.intake")
    return found


@pytest.fixture
async def operator(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@pytest.fixture
async def database(url: str) -> AsyncIterator[PostgresDatabase]:
    opened = await PostgresDatabase.connect(url, statement_s=5.0, commit_s=0.3)
    yield opened
    await opened.close()


def a_store(database: PostgresDatabase) -> Store:
    return Store(database, CLOCK, "a", 30.0, Privacy(a_sealer()))


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():
            await SystemClock().sleep(0.01)


@contextlib.asynccontextmanager
async def standby_away(operator: asyncpg.Connection, url: str) -> AsyncIterator[None]:
    """Each COMMIT is to be on a second server, and there is none."""

    async def waits() -> bool:
        """Whether a COMMIT waits: seen at the server, since a slow one looks the same from here."""
        writer = await asyncpg.connect(url)
        writing = asyncio.create_task(writer.execute(WRITE))
        pid = writer.get_server_pid()

        async def is_known() -> bool:
            return writing.done() or bool(await operator.fetch(f"SELECT 1 {WAITING} AND pid = {pid}"))

        await until(is_known)
        waiting = not writing.done()
        await operator.fetch(f"SELECT pg_terminate_backend({pid})")
        await asyncio.wait([writing])
        writing.exception()
        writer.terminate()
        return waiting

    async def waits_no_more() -> bool:
        return not await waits()

    await operator.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    try:
        await operator.execute("SELECT pg_reload_conf()")
        await until(waits)
        yield
    finally:
        await operator.execute("ALTER SYSTEM RESET synchronous_standby_names")
        await operator.execute("SELECT pg_reload_conf()")
        await until(waits_no_more)


async def cut_what_waits(operator: asyncpg.Connection) -> None:
    """As a restart of the server does: what waited for the standby is there for everybody, on this disk."""
    assert await operator.fetch(f"SELECT pg_terminate_backend(pid) {WAITING}")

    async def gone() -> bool:
        return not await operator.fetch(f"SELECT pid {WAITING}")

    await until(gone)


async def test_an_application_on_one_disk_is_not_acknowledged_when_it_is_sent_again(
    database: PostgresDatabase, operator: asyncpg.Connection, url: str
) -> None:
    store = a_store(database)
    async with standby_away(operator, url):
        with pytest.raises(DependencyDown):
            await store.accept([(new(1), False)])
        assert await operator.fetch(f"SELECT pid {WAITING}"), "given up, not cancelled: it waits on"
        await cut_what_waits(operator)
        assert await operator.fetch("SELECT id FROM application") == [("id-1",)]
        with pytest.raises(DependencyDown):
            await store.accept([(new(1), False)])
    (again,) = await store.accept([(new(1), False)])
    assert (again.id, again.existed) == ("id-1", True)


async def test_a_decision_and_a_withdrawal_on_one_disk_are_not_told_when_they_are_repeated(
    database: PostgresDatabase, operator: asyncpg.Connection, url: str
) -> None:
    store = a_store(database)
    stored = await store.accept([(new(1), True), (new(2), False)])
    results = [decided(one.claim) for one in stored if one.claim]

    async def withdraw() -> None:
        await store.change(LENDER, "id-2", "w-1", {}, "withdrawn", {}, lambda *_: {"state": State.WITHDRAWN.value})

    async with standby_away(operator, url):
        for attempt in range(2):
            with pytest.raises(DependencyDown):
                await store.settle(results)
            with pytest.raises(DependencyDown):
                await withdraw()
            if attempt == 0:
                await cut_what_waits(operator)
    assert await store.settle(results) == set(), "it was, the first time"
    await withdraw()
    assert [event.kind for event in await store.events(LENDER, "id-1")] == ["accepted", "decided"]
    assert [event.kind for event in await store.events(LENDER, "id-2")] == ["accepted", "withdrawn"]


async def test_a_commit_whose_waiting_an_operator_cancels_is_not_acknowledged(
    url: str, operator: asyncpg.Connection
) -> None:
    database = await PostgresDatabase.connect(url, commit_s=10.0)
    store = a_store(database)
    async with standby_away(operator, url):
        accepting = asyncio.create_task(store.accept([(new(1), False)]))
        await until(lambda: operator.fetch(f"SELECT pg_cancel_backend(pid) {WAITING}"))
        with pytest.raises(DependencyDown, match="did not wait for its standby"):
            await accepting
    await database.close()
