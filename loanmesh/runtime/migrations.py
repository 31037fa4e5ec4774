"""Schema migrations: one Alembic tree and one version table a service, on both databases."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from alembic.config import Config
from alembic.environment import EnvironmentContext
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, pool
from sqlalchemy.ext.asyncio import create_async_engine

from loanmesh.runtime.errors import DependencyDown

When = Literal["start", "check"]
LOCK_S = 5.0
"""How long a change of tables waits for those who use them. While it waits, all who come after it wait behind it."""


class OldTables(DependencyDown):
    """The tables are older than this release."""


def prepare(url: str, package: str, when: When) -> None:
    """Bring the tables up to date, or only `check` that somebody has: raises OldTables while they are older."""
    if when == "start":
        upgrade(url, package)
    else:
        check(url, package)


def check(url: str, package: str) -> None:
    """Raise OldTables where the tables of `package` are older than this release.

    Newer ones pass: while a release rolls out, replicas of the one before start again beside its tables.
    """
    script = _script(package)
    known = _known(script)

    def compare(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"version_table": _version_table(package)})
        there = set(context.get_current_heads())
        if not there or (there <= known and there != set(script.get_heads())):
            service = package.rsplit(".", 1)[-1]
            raise OldTables(
                f"the tables are at {', '.join(sorted(there)) or 'no version'}, this release needs "
                f"{', '.join(script.get_heads())}: run `loanmesh migrate {service}`"
            )

    # It only looks: a replica may start while a migration takes its time.
    _connected(url, compare)


def upgrade(url: str, package: str, revision: str = "head", *, lock_s: float = LOCK_S) -> None:
    """Bring the tables of `package` (e.g. `services.intake`) to `revision`. Must run outside an event loop.

    Changes all or nothing; tables of a newer release stay as they are. On PostgreSQL it fails where somebody uses a
    table for longer than `lock_s`: try again.
    """

    def steps(script: ScriptDirectory, current: tuple[str, ...]) -> object:
        # Tables of a newer release stay: whoever goes back to this one runs its migration again, too.
        if not set(current) <= _known(script):
            return []
        return script._upgrade_revs(revision, current)  # type: ignore[arg-type]  # It takes all heads, whatever it says.

    _run(url, package, steps, lock_s)


def downgrade(url: str, package: str, revision: str = "base", *, lock_s: float = LOCK_S) -> None:
    """Take the tables of `package` back to `revision`."""
    _run(url, package, lambda script, current: script._downgrade_revs(revision, current), lock_s)


def _run(url: str, package: str, steps: object, lock_s: float) -> None:
    script = _script(package)
    environment = EnvironmentContext(Config(), script, fn=lambda current, _: steps(script, current))  # type: ignore[operator]

    def migrate(connection: Connection) -> None:
        environment.configure(connection=connection, version_table=_version_table(package), render_as_batch=True)
        with environment, environment.begin_transaction():
            environment.run_migrations()

    _connected(url, migrate, lock_s)


def _script(package: str) -> ScriptDirectory:
    folder = Path(str(importlib.import_module(package).__file__)).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    return ScriptDirectory.from_config(config)


def _known(script: ScriptDirectory) -> set[str]:
    """Every revision up to this release."""
    return {revision.revision for revision in script.walk_revisions()}


def _version_table(package: str) -> str:
    return package.rsplit(".", 1)[-1] + "_version"


def _connected(url: str, work: Callable[[Connection], None], lock_s: float | None = None) -> None:
    """Do the work in one transaction.

    lock_s  how long it waits for a table; None for work that only looks, and need not be alone.
    """
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with _sqlite_engine(url).begin() as connection:
            work(connection)
    else:
        import asyncio

        import asyncpg

        async def over_asyncpg() -> None:
            # The driver reads the url itself, as for the service: only so do all its parameters work, those of TLS too.
            engine = create_async_engine(
                "postgresql+asyncpg://", poolclass=pool.NullPool, async_creator=lambda: asyncpg.connect(url)
            )
            async with engine.begin() as connection:
                if lock_s is not None:
                    # Two replicas that start at once must not both create the tables.
                    await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('loanmesh-migrations'))")
                    await connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(lock_s * 1000)}")
                await connection.run_sync(work)
            await engine.dispose()

        asyncio.run(over_asyncpg())


def _sqlite_engine(url: str) -> Engine:
    """One whose transactions hold the write lock from their first word, and change tables whole or not at all.

    Two replicas that start at once must not both create the tables; one that is killed must not leave half of them.
    """
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"timeout": 30, "isolation_level": None})
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine
