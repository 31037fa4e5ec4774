"""Databases: SQLite and PostgreSQL behind one small door.

A change is a *script*: a generator that yields statements and is handed their RETURNING rows. The script is written
once; each database drives it inside one transaction. Statements use `?` for parameters, and these words where the two
dialects differ: `{now}` (the database's clock, seconds since 1970), `{skip_locked}` (claims that do not wait),
`{for_update}` (rows that nobody else may change meanwhile), `{synced}` (to select: the COMMIT then waits for the
standby even where the script changed nothing, and so for whatever was committed before).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import re
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import asyncpg

from loanmesh.runtime.errors import DependencyDown

T = TypeVar("T")
Row = tuple[Any, ...]


class Statement(NamedTuple):
    """SQL to run once per row of parameters; the script gets all RETURNING rows, in order."""

    sql: str
    rows: Sequence[Sequence[object]] = ((),)


Script = Generator[Statement, list[Row], T]


class Database(Protocol):
    """Where a service keeps its tables."""

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction. When this returns, it is on disk.

        Raises DependencyDown when the database cannot be reached or written; nothing is then changed, unless the
        connection broke during COMMIT, when it may be: scripts must be safe to repeat.
        """
        ...

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read committed rows. Raises DependencyDown."""
        ...

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read committed rows where that may take long: never on the event loop. Raises DependencyDown."""
        ...

    async def close(self) -> None:
        """Finish what is under way and close."""
        ...


async def open_database(url: str) -> Database:
    """Open `sqlite:///path/to/file.db` or `postgresql://...`. Raises ValueError for another scheme, DependencyDown."""
    if url.startswith("sqlite:///"):
        return SqliteDatabase(Path(url.removeprefix("sqlite:///")))
    if url.startswith(("postgresql://", "postgres://")):
        return await PostgresDatabase.connect(url)
    raise ValueError("database url must start with sqlite:/// or postgresql://")


# --- SQLite: statements on the event loop, their COMMIT in a thread; whoever waits meanwhile is in the next one. ---

_SQLITE_WORDS = {
    "{now}": "((julianday('now') - 2440587.5) * 86400.0)",
    "{skip_locked}": "",
    "{for_update}": "",
    "{synced}": "1",
}
_Job = tuple[Callable[[], Script[Any]], "asyncio.Future[Any]"]
_GROUP_MAX = 256
_ROWS_AT_ONCE = 64
"""Rows written before the loop gets its turn: one to two milliseconds."""
BUSY_S = 10.0
"""How long a writer waits for other processes on the same file, seconds. Beyond, the callers are told to come again."""


class SqliteDatabase:
    """WAL, synchronous=FULL: what was committed survives a power cut.

    A statement costs microseconds, and in a thread as many switches between it and the loop as it has rows, since each
    step of SQLite lets go of the interpreter. So only what waits for the disk or for other processes is in the thread.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._jobs: deque[_Job] = deque()
        self._loop = asyncio.get_running_loop()
        self._reader = self._connect(BUSY_S)
        self._reader.execute("PRAGMA query_only=ON")
        self._writer: sqlite3.Connection | None = None
        self._scanner = ThreadPoolExecutor(1, thread_name_prefix="sqlite-scan")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sqlite-disk")
        self._writing: asyncio.Task[None] | None = None
        self._closed = False

    def _connect(self, busy_s: float) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=busy_s, isolation_level=None, check_same_thread=False)
        _use_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")
        return connection

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Queue the script for the writer; returns after the COMMIT that carries it."""
        if self._closed:
            raise DependencyDown("the database is closed")
        future: asyncio.Future[T] = self._loop.create_future()
        self._jobs.append((script, future))
        if self._writing is None:
            # In a context of its own: it goes on for others when the caller is gone.
            self._writing = self._loop.create_task(self._write(), context=contextvars.Context())
        return await future

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read inline: an indexed read takes microseconds, a thread hop a hundred times that."""
        try:
            return self._reader.execute(_sqlite_text(sql), params).fetchall()
        except sqlite3.OperationalError as error:
            raise DependencyDown(f"the database cannot be read: {error}") from error

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read in a thread of its own, one at a time: others wait, the loop does not."""
        return await self._loop.run_in_executor(self._scanner, self._scan, sql, params)

    def _scan(self, sql: str, params: Sequence[object]) -> list[Row]:
        try:
            with contextlib.closing(sqlite3.connect(self._path, timeout=BUSY_S)) as connection:
                connection.execute("PRAGMA query_only=ON")
                return connection.execute(_sqlite_text(sql), params).fetchall()
        except sqlite3.OperationalError as error:
            raise DependencyDown(f"the database cannot be read: {error}") from error

    async def close(self) -> None:
        """Commit what waits, then close."""
        self._closed = True
        if self._writing:
            await self._writing
        for executor in (self._disk, self._scanner):
            await asyncio.to_thread(executor.shutdown)
        for connection in (self._writer, self._reader):
            if connection:
                connection.close()

    async def _write(self) -> None:
        try:
            while self._jobs:
                group = [self._jobs.popleft() for _ in range(min(_GROUP_MAX, len(self._jobs)))]
                try:
                    answers = await self._commit(group)
                except Exception as error:  # noqa: BLE001  Whatever it is, those who wait must not wait for ever.
                    # Not even a rollback: this connection is given up, and with it what it holds.
                    lost, self._writer = self._writer, None
                    if lost:
                        with contextlib.suppress(sqlite3.Error):
                            lost.close()
                    answers = _all(group, error)
                for future, value in answers:
                    if not future.done():
                        if isinstance(value, Exception):
                            future.set_exception(value)
                        else:
                            future.set_result(value)
        finally:
            self._writing = None

    async def _commit(self, group: list[_Job]) -> list[_Answer]:
        if self._writer is None:
            self._writer = await self._on_disk(self._connect, 0.0)
        writer = self._writer
        answers: list[_Answer] = []
        try:
            await self._begin(writer)
            for number, (script, future) in enumerate(group, 1):
                # One bad script must not take its neighbours' changes with it.
                writer.execute("SAVEPOINT script")
                try:
                    answers.append((future, await _drive(script(), lambda s: self._execute(writer, s))))
                except sqlite3.OperationalError:
                    raise
                except Exception as error:  # noqa: BLE001  Handed to the caller who waits for it.
                    writer.execute("ROLLBACK TO script")
                    answers.append((future, error))
                writer.execute("RELEASE script")
                if number % _ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)  # noqa: TID251  Others get their turn; takes no time.
            await self._on_disk(writer.execute, "COMMIT")
        except (sqlite3.Error, MemoryError) as error:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            return _all(group, error)
        return answers

    async def _begin(self, writer: sqlite3.Connection) -> None:
        """Take the file's write lock: at once, or in the thread where another process has it."""
        try:
            writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            await self._on_disk(self._begin_when_free, writer)

    def _begin_when_free(self, writer: sqlite3.Connection) -> None:
        writer.execute(f"PRAGMA busy_timeout={BUSY_S * 1000:.0f}")
        try:
            writer.execute("BEGIN IMMEDIATE")
        finally:
            writer.execute("PRAGMA busy_timeout=0")

    async def _execute(self, writer: sqlite3.Connection, statement: Statement) -> list[Row]:
        sql, rows = _sqlite_text(statement.sql), statement.rows
        if len(rows) <= _ROWS_AT_ONCE:
            return sqlite_execute(writer, sql, rows)
        found: list[Row] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            found += sqlite_execute(writer, sql, rows[start : start + _ROWS_AT_ONCE])
            await asyncio.sleep(0)  # noqa: TID251  Others get their turn; takes no time.
        return found

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await self._loop.run_in_executor(self._disk, work, *args)


_Answer = tuple["asyncio.Future[Any]", Any]


def _all(group: Sequence[_Job], error: Exception) -> list[_Answer]:
    down = DependencyDown(f"the database cannot be written: {error}")
    return [(future, down) for _, future in group]


def _use_wal(connection: sqlite3.Connection) -> None:
    # The one statement that does not wait for its turn by itself: several replicas may open a new file at once.
    for _ in range(int(BUSY_S / 0.05)):
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode=WAL")
            return
        time.sleep(0.05)
    connection.execute("PRAGMA journal_mode=WAL")


async def _drive(script: Script[T], execute: Callable[[Statement], Awaitable[list[Row]]]) -> T:
    try:
        statement = next(script)
        while True:
            statement = script.send(await execute(statement))
    except StopIteration as end:
        result: T = end.value
        return result


@lru_cache(maxsize=500)
def _sqlite_text(sql: str) -> str:
    for word, text in _SQLITE_WORDS.items():
        sql = sql.replace(word, text)
    return sql


def sqlite_execute(connection: sqlite3.Connection, sql: str, rows: Sequence[Sequence[object]]) -> list[Row]:
    """Run a statement in SQLite's words once for each row of parameters; all RETURNING or SELECTed rows, in order."""
    if "RETURNING" not in sql and not sql.lstrip().upper().startswith("SELECT"):
        connection.executemany(sql, rows)
        return []
    found: list[Row] = []
    for params in rows:
        found.extend(connection.execute(sql, params))
    return found


# --- PostgreSQL: a small pool; statements of many rows are pipelined. ---

_POSTGRES_WORDS = {
    "{now}": "(extract(epoch from clock_timestamp())::float8)",
    "{skip_locked}": "FOR UPDATE SKIP LOCKED",
    "{for_update}": "FOR UPDATE",
    # Any record in the log does: a COMMIT that wrote none waits for nobody.
    "{synced}": "pg_logical_emit_message(true, 'loanmesh', '')::text",
}
_COME_AGAIN = (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError, asyncpg.PostgresError)
"""What may pass by itself: a broken connection, a server that stops or starts, no space, a confused driver ..."""
_OUR_MISTAKES = (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError, asyncpg.SyntaxOrAccessError)
"""... but not what no later try would mend."""
_AT_ONCE = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
"""Somebody else came first; nothing is wrong, and the same script passes when it is run again."""
_CUT = (
    ConnectionError, asyncpg.PostgresConnectionError, asyncpg.AdminShutdownError, asyncpg.CrashShutdownError,
    asyncpg.InterfaceError, asyncpg.InternalClientError,
)  # fmt: skip
"""The connection is gone, or of no use, and the next may be sound: the server was started anew, or another leads."""
_RUNS_MAX = 5
ACQUIRE_S = 10.0
"""How long a caller waits for a free connection, seconds."""
STATEMENT_S = 10.0
"""How long a statement may take before it is cancelled, seconds."""
COMMIT_S = 10.0
"""How long a COMMIT may take before its connection is given up, seconds."""
_WARNING = "01000"
"""SQLSTATE of the warning by which PostgreSQL says that it committed without waiting for its standby."""


class PostgresDatabase:
    """synchronous_commit=on, as the server's default must stay: an acknowledged row survives a crash."""

    def __init__(self, pool: Any, commit_s: float = COMMIT_S) -> None:
        self._pool = pool
        self._commit_s = commit_s

    @classmethod
    async def connect(
        cls, url: str, connections: int = 4, *, statement_s: float = STATEMENT_S, commit_s: float = COMMIT_S
    ) -> PostgresDatabase:
        """Open a pool. Raises DependencyDown when the server does not answer."""
        try:
            pool = await asyncpg.create_pool(
                url,
                min_size=1,
                max_size=connections,
                command_timeout=statement_s,
                server_settings={"synchronous_commit": "on"},
            )
        except _COME_AGAIN as error:
            raise DependencyDown(f"PostgreSQL does not answer: {type(error).__name__}") from error
        return cls(pool, commit_s)

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction."""

        async def use(connection: Any) -> T:
            for run in itertools.count(1):
                try:
                    return await self._transact(connection, script)
                except _AT_ONCE:
                    if run == _RUNS_MAX:
                        raise
            raise AssertionError("the last run returns or raises")

        return await self._with_connection("written", use)

    async def _transact(self, connection: Any, script: Callable[[], Script[T]]) -> T:
        # Not by the driver's own transactions: their COMMIT has the time of any statement, and is cancelled after it.
        await connection.execute("BEGIN")
        try:
            result = await _drive(script(), lambda s: _postgres_execute(connection, s))
        except BaseException:
            await connection.execute("ROLLBACK")
            raise
        await self._commit(connection)
        return result

    async def _commit(self, connection: Any) -> None:
        """COMMIT, on as many disks as the server is told to. Raises DependencyDown where it is on fewer.

        Never cancelled: while its standby is away PostgreSQL answers a cancelled COMMIT by committing on its own disk
        alone, and shows the rows to everybody. A connection that is given up leaves it waiting.
        """
        heard: list[str] = []

        def hear(_: object, message: Any) -> None:
            heard.append(message.sqlstate)

        giving_up = asyncio.get_running_loop().call_later(self._commit_s, connection.terminate)
        connection.add_log_listener(hear)
        try:
            await connection.execute("COMMIT", timeout=2 * self._commit_s)
        finally:
            giving_up.cancel()
            with contextlib.suppress(asyncpg.InterfaceError):  # Given up: it is no longer ours.
                connection.remove_log_listener(hear)
        if _WARNING in heard:
            # Somebody else cancelled it: it is committed on one disk, and not to be acknowledged.
            raise DependencyDown("PostgreSQL did not wait for its standby")

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read committed rows; once more, where the connection was cut, since reading changes nothing."""

        async def use(connection: Any) -> list[Row]:
            return [tuple(row) for row in await connection.fetch(_postgres_text(sql), *params)]

        return await self._with_connection("read", use, tries=2)

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """As `read`: the work is the server's."""
        return await self.read(sql, params)

    async def _with_connection(self, what: str, use: Callable[[Any], Awaitable[T]], tries: int = 1) -> T:
        try:
            while True:
                connection = await self._pool.acquire(timeout=ACQUIRE_S)
                try:
                    # A caller that is cancelled leaves it running to its end: cancelled in the middle of a statement,
                    # the driver now and then gives a connection back to the pool that is still busy with it.
                    return await asyncio.shield(asyncio.create_task(self._use(connection, use)))
                except _CUT:
                    tries -= 1
                    if not tries:
                        raise
                    # The others of the pool may be as dead, and not know it yet.
                    await self._pool.expire_connections()
        except _OUR_MISTAKES:
            raise
        except _COME_AGAIN as error:
            raise DependencyDown(f"the database cannot be {what}: {type(error).__name__}") from error

    async def _use(self, connection: Any, use: Callable[[Any], Awaitable[T]]) -> T:
        try:
            return await use(connection)
        except asyncpg.InternalClientError:
            connection.terminate()  # Nobody knows what it is in the middle of.
            raise
        finally:
            await self._pool.release(connection)

    async def close(self) -> None:
        """Close the pool."""
        await self._pool.close()


@lru_cache(maxsize=500)
def _postgres_text(sql: str) -> str:
    for word, text in _POSTGRES_WORDS.items():
        sql = sql.replace(word, text)
    count = itertools.count(1)
    return re.sub(r"\?", lambda _: f"${next(count)}", sql)


async def _postgres_execute(connection: Any, statement: Statement) -> list[Row]:
    sql = _postgres_text(statement.sql)
    if not statement.rows:
        return []
    if "RETURNING" not in sql and not sql.lstrip().upper().startswith("SELECT"):
        await connection.executemany(sql, statement.rows)
        return []
    return [tuple(row) for row in await connection.fetchmany(sql, statement.rows)]
