"""Empty databases on the PostgreSQL that the tests started."""

from __future__ import annotations

import os
from urllib.parse import urlsplit, urlunsplit

import asyncpg


async def new_database(server: str) -> str:
    """Create one; its address."""
    name = f"t_{os.urandom(6).hex()}"
    connection = await asyncpg.connect(server)
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
