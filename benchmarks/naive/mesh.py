"""The plain mesh, started on the same cores as ours, with the same sandbox for its sources."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from benchmarks.bench import Bench
from benchmarks.machine import child
from loanmesh.runtime.keys import new_ring, write_ring


@asynccontextmanager
async def plain_mesh(bench: Bench, **environment: str) -> AsyncIterator[tuple[str, dict[str, int]]]:
    """The address of its intake, and the process ids of its services; `environment` holds settings that win."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        sandbox = child("-m", "lab.sandbox", "--port", "0", "--state", folder, cores=bench.cores.outside)
        _, ready = await stack.enter_async_context(sandbox)
        sources_url = f"http://{json.loads(ready)['address']}"
        keys = Path(folder) / "bureau-keys.json"
        write_ring(keys, new_ring(bench.clock.now()), new=True)
        settings = {
            "BUREAU_SOURCES_URL": sources_url,
            "BUREAU_DATABASE_URL": f"sqlite:///{folder}/bureau.db",
            "BUREAU_PRIVACY__KEYS_FILE": str(keys),
        }
        pids: dict[str, int] = {}
        address = ""
        for name in ("bureau", "scoring", "pricing", "intake"):
            started = child(
                "-m", "benchmarks.naive.service", name, cores=bench.cores.services, environment=settings | environment
            )
            process, address = await stack.enter_async_context(started)
            pids[name] = process.pid
            if name != "intake":
                settings[f"INTAKE_{name.upper()}"] = address
        yield address, pids
