"""A whole mesh in real processes, on free ports, with short leases so that takeovers are quick."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock
from tests.databases import new_database

Fault = Callable[..., object]


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def mesh(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    """The mesh on either kind of database."""
    monkeypatch.setenv("INTAKE_LEASE__DURATION_S", "2")
    if request.param == "postgres":
        server: str = request.getfixturevalue("postgres")
        for service in ("INTAKE", "BUREAU"):
            monkeypatch.setenv(f"{service}_DATABASE_URL", await new_database(server))
    started = Mesh(tmp_path / "state", None, free_ports(), SystemClock(), print)
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


@pytest.fixture
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    """A patient caller."""
    async with Client(mesh.parts["intake"].address, patience_s=60) as made:
        yield made


async def set_fault(mesh: Mesh, source: str, **fault: object) -> None:
    """Break or mend a source."""
    url = f"http://{mesh.parts['sandbox'].address}/control/faults"
    async with aiohttp.ClientSession() as session, session.post(url, json={"source": source, **fault}) as answer:
        answer.raise_for_status()
