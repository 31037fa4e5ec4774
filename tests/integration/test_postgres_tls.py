"""PostgreSQL over TLS, by its URL or by the environment: migrations and the service's own connections.

The PostgreSQL that the tests have speaks no TLS, so a front of our own speaks it for the server, as a proxy does.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from loanmesh.cli.authority import Authority, Subject
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.migrations import upgrade
from tests.databases import new_database

pytestmark = pytest.mark.postgres
SSL_REQUEST = b"\0\0\0\x08\x04\xd2\x16\x2f"


@asynccontextmanager
async def in_front(server: str, folder: Path) -> AsyncIterator[int]:
    """Listens with a certificate for localhost and passes all on to the server's socket; its port. Refuses whoever does
    not ask for TLS first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    socket = Path(parse_qs(urlsplit(server).query)["host"][0]) / ".s.PGSQL.5432"
    under_way: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readexactly(8) != SSL_REQUEST:
            writer.close()
            return
        writer.write(b"S")
        await writer.start_tls(context)
        behind_reader, behind_writer = await asyncio.open_unix_connection(str(socket))
        await asyncio.gather(pass_on(reader, behind_writer), pass_on(behind_reader, writer), return_exceptions=True)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        under_way.add(task)

    front = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield front.sockets[0].getsockname()[1]
    finally:
        front.close()
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def test_migrations_and_connections_speak_tls_and_verify_the_server(postgres: str, tmp_path: Path) -> None:
    ours, other = (Authority(tmp_path / name, SystemClock().now) for name in ("ours", "other"))
    for authority in (ours, other):
        authority.create("loanmesh")
    name = urlsplit(await new_database(postgres)).path
    async with in_front(postgres, ours.issue(Subject("service", "postgres"))) as port:

        def url(ca: Path) -> str:
            return f"postgresql://postgres:@localhost:{port}{name}?sslmode=verify-full&sslrootcert={ca}"

        await asyncio.to_thread(upgrade, url(ours.bundle), "services.bureau")
        database = await open_database(url(ours.bundle))
        await database.close()
        with pytest.raises(DependencyDown):
            await open_database(url(other.bundle))
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(upgrade, url(other.bundle), "services.bureau")


async def test_the_environment_asks_for_it_as_well_as_the_url(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a cluster, where the operator of the database writes the URL, and says nothing of TLS in it.
    ours, other = (Authority(tmp_path / name, SystemClock().now) for name in ("ours", "other"))
    for authority in (ours, other):
        authority.create("loanmesh")
    name = urlsplit(await new_database(postgres)).path
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    async with in_front(postgres, ours.issue(Subject("service", "postgres"))) as port:
        url = f"postgresql://postgres:@localhost:{port}{name}"
        monkeypatch.setenv("PGSSLROOTCERT", str(ours.bundle))
        await asyncio.to_thread(upgrade, url, "services.bureau")
        database = await open_database(url)
        await database.close()
        monkeypatch.setenv("PGSSLROOTCERT", str(other.bundle))
        with pytest.raises(DependencyDown):
            await open_database(url)
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(upgrade, url, "services.bureau")
