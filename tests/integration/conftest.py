"""What several files need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from loanmesh.runtime.database import Database, open_database
from loanmesh.runtime.migrations import upgrade


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """Intake's tables, empty, on either database."""
    await asyncio.to_thread(upgrade, database_url, "services.intake")
    opened = await open_database(database_url)
    yield opened
    await opened.close()
