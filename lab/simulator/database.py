"""A database server that dies, sleeps and is slow: SQLite in memory, its clock virtual, its answers late.

Each script is one transaction, as in the real drivers. What a script does is there from its COMMIT on; the answer
comes later, or never: the caller may die in between, or the server, and then nobody was told. Triggers watch for what
no replica may do, whoever asks for it.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import MetaData
from sqlalchemy.dialects import sqlite
from sqlalchemy.schema import CreateIndex, CreateTable

from lab.simulator.loop import EPOCH_S, Node, VirtualLoop
from lab.simulator.network import Observer
from loanmesh.runtime.database import Row, Script, Statement, sqlite_execute
from loanmesh.runtime.errors import DependencyDown

T = TypeVar("T")
_WORDS = {"{now}": "sim_now()", "{skip_locked}": "", "{for_update}": "", "{synced}": "1"}
INTAKE_GUARDS = """
CREATE TRIGGER lease_respected BEFORE UPDATE OF fence ON application
WHEN NEW.fence > OLD.fence AND OLD.owner IS NOT NULL AND OLD.lease_until >= sim_now()
BEGIN SELECT sim_violate('leases_are_respected', OLD.id, 'taken from ' || OLD.owner || ' while its lease held'); END;

CREATE TRIGGER fence_grows BEFORE UPDATE OF fence ON application WHEN NEW.fence < OLD.fence
BEGIN SELECT sim_violate('fences_grow', OLD.id, 'fence ' || OLD.fence || ' became ' || NEW.fence); END;

CREATE TRIGGER claimed_means_fenced BEFORE UPDATE OF owner ON application
WHEN NEW.owner IS NOT NULL AND NEW.owner IS NOT OLD.owner AND NEW.fence <= OLD.fence
BEGIN SELECT sim_violate('fences_grow', OLD.id, 'changed hands without a new fence'); END;

CREATE TRIGGER renewed_by_owner BEFORE UPDATE OF lease_until ON application
WHEN NEW.fence = OLD.fence AND NEW.lease_until IS NOT NULL AND OLD.owner IS NOT sim_runner()
BEGIN SELECT sim_violate('leases_are_respected', OLD.id, sim_runner() || ' renewed a lease of ' || OLD.owner); END;

CREATE TRIGGER decided_by_holder BEFORE INSERT ON decision
WHEN NEW.fence <> (SELECT fence FROM application WHERE id = NEW.application_id)
BEGIN SELECT sim_violate('fences_hold', NEW.application_id, 'decided under fence ' || NEW.fence || ', long lost'); END;

CREATE TRIGGER revisions_count BEFORE UPDATE OF revision ON application
WHEN NEW.revision NOT IN (OLD.revision, OLD.revision + 1)
BEGIN SELECT sim_violate('revisions_count', OLD.id, 'revision ' || OLD.revision || ' became ' || NEW.revision); END;

CREATE TRIGGER parked_is_left_alone BEFORE UPDATE OF fence ON application WHEN OLD.state = 'PARKED'
BEGIN SELECT sim_violate('parked_rests', OLD.id, 'claimed while it was parked'); END;

CREATE TRIGGER stored AFTER INSERT ON application BEGIN SELECT sim_stored(NEW.id, NEW.owner IS NULL); END;

CREATE TRIGGER looked_at_seldom BEFORE UPDATE OF attempts ON application WHEN NEW.attempts > OLD.attempts
BEGIN SELECT sim_attempt(OLD.id, NEW.attempts); END;
"""
"""What the tables themselves know to be wrong."""


def ddl(metadata: MetaData) -> list[str]:
    """The statements that make a service's tables."""
    statements = []
    for table in metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=sqlite.dialect())))
        for index in sorted(table.indexes, key=lambda i: str(i.name)):
            statements.append(str(CreateIndex(index).compile(dialect=sqlite.dialect())))
    return statements


@lru_cache
def blank(metadata: MetaData, guards: str) -> bytes:
    """An empty database with a service's tables, as SQLite's own bytes: quicker to open than to make."""
    connection = sqlite3.connect(":memory:")
    for name, count in (("sim_now", 0), ("sim_runner", 0), ("sim_violate", 3), ("sim_attempt", 2), ("sim_stored", 2)):
        connection.create_function(name, count, lambda *_: None)
    for statement in ddl(metadata):
        connection.execute(statement)
    connection.executescript(guards)
    connection.commit()
    return connection.serialize()


class DatabaseServer:
    """One server, many connections."""

    def __init__(
        self, name: str, template: bytes, loop: VirtualLoop, dice: random.Random, observer: Observer, *, inline: bool
    ) -> None:
        self.name = name
        self.loop = loop
        self._dice = dice
        self._observer = observer
        self._inline = inline
        """Whether reads take no time, as with an embedded database."""
        self._connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=300)
        self._connection.deserialize(template)
        self._connection.create_function("sim_now", 0, lambda: EPOCH_S + loop.now_s)
        self._connection.create_function("sim_runner", 0, lambda: self._runner)
        self._connection.create_function("sim_violate", 3, observer.violate)
        self._connection.create_function("sim_attempt", 2, observer.looked_at)
        self._connection.create_function("sim_stored", 2, observer.stored)
        self._connection.create_function("sim_skew", 0, lambda: self._skew_s)
        self._runner = ""
        self._skew_s = 0.0
        self._under_way: dict[int, _Job] = {}
        self._count = 0
        self.up = True
        self.latency_s = 0.001

    def connect(self, node: Node, owner: str) -> SimDatabase:
        """A process's connection. `owner`: under which name it leases."""
        return SimDatabase(self, node, owner)

    def ask(self, sql: str) -> list[Row]:
        """Look from outside of everything, at no time."""
        return self._connection.execute(_text(sql)).fetchall()

    def stop(self) -> None:
        """Die at once: what is not committed never will be, and nobody learns of what is."""
        self.up = False
        for job in list(self._under_way.values()):
            self._refuse(job)
        self._under_way.clear()

    def start(self) -> None:
        """Come back with all that was committed."""
        self.up = True

    def close(self) -> None:
        """Forget everything."""
        self._connection.close()

    def _wait_s(self) -> float:
        return 0.0001 + self._dice.expovariate(1.0) * self.latency_s

    def submit(self, job: _Job) -> None:
        """Take a script or a read."""
        if not self.up:
            self._refuse(job)
            return
        self._count += 1
        job.number = self._count
        self._under_way[job.number] = job
        self.loop.post(self.loop.world, self._wait_s(), self._execute, job)

    def _execute(self, job: _Job) -> None:
        if job.number not in self._under_way:
            return
        # The process died with its transaction open: sometimes the COMMIT was on its way already.
        if not job.node.alive and self._dice.random() < 0.5:
            del self._under_way[job.number]
            return
        self._runner, self._skew_s = job.owner, job.node.skew_s
        job.value, job.error = self.perform(job.work)
        self.loop.post(self.loop.world, self._wait_s(), self._answer, job)

    def perform(self, work: Callable[[sqlite3.Connection], Any]) -> tuple[Any, Exception | None]:
        """In one transaction."""
        self._connection.execute("BEGIN")
        try:
            value = work(self._connection)
        except Exception as error:  # noqa: BLE001  Handed to the caller who waits for it, as the real driver does.
            self._connection.execute("ROLLBACK")
            return None, error
        self._connection.execute("COMMIT")
        return value, None

    def transact(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction, at no time."""
        value, error = self.perform(lambda c: _drive(script(), lambda statement: _perform(c, statement)))
        if error:
            raise error
        answer: T = value
        return answer

    def _answer(self, job: _Job) -> None:
        if self._under_way.pop(job.number, None):
            self.loop.post(job.node, 0.0, _settle, job)

    def _refuse(self, job: _Job) -> None:
        job.error = DependencyDown(f"the database {self.name} cannot be reached")
        self.loop.post(job.node, self._wait_s(), _settle, job)

    def read_now(self, sql: str, params: Sequence[object]) -> list[Row]:
        """A read that takes no time."""
        if not self.up:
            raise DependencyDown(f"the database {self.name} cannot be read")
        return self._connection.execute(_text(sql), tuple(params)).fetchall()

    @property
    def inline(self) -> bool:
        """Whether reads take no time."""
        return self._inline


class _Job:
    """Work at the server, and who waits for it."""

    __slots__ = ("error", "future", "node", "number", "owner", "value", "work")

    def __init__(self, node: Node, owner: str, work: Callable[[sqlite3.Connection], Any], future: Any) -> None:
        self.node = node
        self.owner = owner
        self.work = work
        self.future = future
        self.number = 0
        self.value: Any = None
        self.error: Exception | None = None


def _settle(job: _Job) -> None:
    if job.future.done():
        return
    if job.error:
        job.future.set_exception(job.error)
    else:
        job.future.set_result(job.value)


class SimDatabase:
    """What a service sees of it: loanmesh.runtime.database.Database."""

    def __init__(self, server: DatabaseServer, node: Node, owner: str) -> None:
        self._server = server
        self._node = node
        self._owner = owner
        self._under_way: dict[asyncio.Future[Any], None] = {}

    async def run(self, script: Callable[[], Script[T]]) -> T:
        """Run a script in one transaction; returns after its COMMIT. Raises DependencyDown."""

        def work(connection: sqlite3.Connection) -> T:
            return _drive(script(), lambda statement: _perform(connection, statement))

        answer: T = await self._ask(work)
        return answer

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """Read committed rows. Raises DependencyDown."""
        if self._server.inline:
            return self._server.read_now(sql, params)
        rows: list[Row] = await self._ask(lambda c: c.execute(_text(sql), tuple(params)).fetchall())
        return rows

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[Row]:
        """As `read`."""
        return await self.read(sql, params)

    async def close(self) -> None:
        """Finish what is under way."""
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _ask(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        future: asyncio.Future[Any] = self._server.loop.create_future()
        self._under_way[future] = None
        future.add_done_callback(self._under_way.pop)
        self._server.submit(_Job(self._node, self._owner, work, future))
        return await future


@lru_cache(maxsize=500)
def _text(sql: str) -> str:
    for word, text in _WORDS.items():
        sql = sql.replace(word, text)
    return sql


def _perform(connection: sqlite3.Connection, statement: Statement) -> list[Row]:
    return sqlite_execute(connection, _text(statement.sql), statement.rows)


def _drive(script: Script[T], execute: Callable[[Statement], list[Row]]) -> T:
    """Run a script to its end; nothing has to be awaited here."""
    try:
        statement = next(script)
        while True:
            statement = script.send(execute(statement))
    except StopIteration as end:
        result: T = end.value
        return result
