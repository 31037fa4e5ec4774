"""Decisions a second beside engines for durable workflows: DBOS and Temporal, each at its sensible best.

The rivals run from an environment of their own (`make rivals`), on all cores, with empty steps; ours does the real
work, on its own cores, with the generator apart. Each rival is tried in several settings and its best one counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ours, pictures
from benchmarks.bench import Bench, Found, Row, at_least, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.load import Measured, closed_loop
from benchmarks.machine import end, pin
from benchmarks.postgres import Postgres, postgres
from lab.population import Population
from loanmesh.client import Client

RIVALS = Path(__file__).parent / "rivals"
BIN = RIVALS / ".venv/bin"
FINISH_WITHIN_S = 180.0
MISSING = "**The rivals were not measured: their environment is not there. `make rivals` builds it.**"


@dataclass(frozen=True)
class Setting:
    """One way to run a rival."""

    rival: str
    database: str
    said: str
    script: str
    way: str
    in_flight: int
    processes: int = 1


SETTINGS = (
    Setting("DBOS", "SQLite", "started at once, 16 in flight", "dbos_workflow.py", "start", 16),
    Setting("DBOS", "SQLite", "started at once, 64 in flight", "dbos_workflow.py", "start", 64),
    Setting("DBOS", "PostgreSQL", "started at once, 64 in flight", "dbos_workflow.py", "start", 64),
    Setting("DBOS", "PostgreSQL", "two processes, 32 in flight each", "dbos_workflow.py", "start", 32, 2),
    Setting("DBOS", "PostgreSQL", "through a queue, two processes, 32 each", "dbos_workflow.py", "queue", 32, 2),
    Setting("Temporal", "SQLite", "local activities, 64 in flight", "temporal_workflow.py", "local", 64),
    Setting("Temporal", "SQLite", "activities as tasks, 64 in flight", "temporal_workflow.py", "remote", 64),
    Setting("Temporal", "memory", "local activities, 64 in flight", "temporal_workflow.py", "local", 64),
)


async def measure(bench: Bench) -> Found:
    """Ours on both databases, then each rival in each setting."""
    cores = bench.cores.services | bench.cores.outside
    with postgres(cores) as server:
        mine = {"SQLite": await _ours(bench)}
        server.move_to(bench.cores.services)
        mine["PostgreSQL"] = await _ours(bench, server)
        server.move_to(cores)
        bench.say("durable: ours done")
        if not BIN.is_dir():
            return Found(rows=[], markdown=[_ours_table(mine), MISSING])
        rates: dict[Setting, float] = {}
        for setting in SETTINGS if not bench.quick else (SETTINGS[0], SETTINGS[3], SETTINGS[5]):
            rates[setting] = await _rival(bench, setting, server)
            bench.say(f"durable: {setting.rival}, {setting.database}, {setting.said}: {rates[setting]:.1f}/s")
    best = _best(rates)
    _draw(bench, mine, best)
    return Found(
        rows=_rows(mine, best),
        markdown=[_ours_table(mine), _rivals_table(rates)],
        measured={
            "ours": {name: vars(one) for name, one in mine.items()},
            "rivals": [{**vars(setting), "a_second": rate} for setting, rate in rates.items()],
        },
    )


async def _ours(bench: Bench, server: Postgres | None = None) -> Measured:
    """One by one, warm."""
    count, environment = bench.size(2000, 60), {}
    if server:
        names = ("INTAKE_DATABASE_URL", "BUREAU_DATABASE_URL")
        environment = {name: await server.new_database() for name in names}
    async with (
        ours.our_mesh(bench, **environment) as mesh,
        Client(mesh.parts["intake"].address) as client,
    ):
        prepared = ours.prepare(Population(bench.seed), 0, min(count, 300), bench.clock)
        await ours.decide_many(client, prepared, bench.clock)  # Fills bureau's cache.
        return await closed_loop(
            ours.pids(mesh),
            count,
            IN_FLIGHT,
            lambda index: ours.decide(client, prepared[index % len(prepared)]),
            bench.clock,
        )


async def _rival(bench: Bench, setting: Setting, server: Postgres) -> float:
    """Decisions a second."""
    count = bench.size(600, 20) // setting.processes
    with tempfile.TemporaryDirectory() as folder:
        if setting.rival == "Temporal":
            file = None if setting.database == "memory" else Path(folder) / "temporal.db"
            async with _temporal(bench, file) as address:
                return await _processes(bench, setting, address, count)
        sqlite = f"sqlite:///{folder}/dbos.db"
        return await _processes(bench, setting, sqlite if setting.database == "SQLite" else
                                _for_psycopg(await server.new_database()), count)  # fmt: skip


def _for_psycopg(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


async def _processes(bench: Bench, setting: Setting, at: str, count: int) -> float:
    """Start them, wait until all are ready, let them go at once."""
    started = []
    try:
        for number in range(setting.processes):
            process = await asyncio.create_subprocess_exec(
                BIN / "python", RIVALS / setting.script, at, str(count), str(setting.in_flight), setting.way,
                f"rival-{number}", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            pin(process.pid, bench.cores.services | bench.cores.outside)
            started.append(process)
            await _line(process)
        begun = bench.clock.monotonic()
        for process in started:
            assert process.stdin
            process.stdin.write(b"go\n")
        said = [json.loads(await _line(process)) for process in started]
        return float(sum(one["count"] for one in said) / (bench.clock.monotonic() - begun))
    finally:
        await asyncio.gather(*(end(process) for process in started))


async def _line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout
    assert process.stderr
    async with asyncio.timeout(FINISH_WITHIN_S):
        line = (await process.stdout.readline()).decode().strip()
        if not line:
            last = (await process.stderr.read()).decode(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"a rival ended before it was done: {' '.join(last)}")
    return line


@asynccontextmanager
async def _temporal(bench: Bench, file: Path | None) -> AsyncIterator[str]:
    """Temporal's development server on loopback, with its namespace there; its address."""
    port = _free_port()
    durable = () if file is None else ("--db-filename", str(file), "--sqlite-pragma", "journal_mode=wal",
                                       "--sqlite-pragma", "synchronous=full")  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        BIN / "temporal", "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port),
        "--log-level", "error", *durable, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "DO_NOT_TRACK": "1"},
    )  # fmt: skip
    pin(process.pid, bench.cores.services | bench.cores.outside)
    try:
        async with asyncio.timeout(30):
            while not await _healthy(port):
                assert process.returncode is None, "Temporal's server ended at once"
                await bench.clock.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        await end(process)


async def _healthy(port: int) -> bool:
    asked = await asyncio.create_subprocess_exec(
        BIN / "temporal", "operator", "namespace", "describe", "default", "--address", f"127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    return await asked.wait() == 0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _best(rates: dict[Setting, float]) -> dict[tuple[str, str], float]:
    """By rival and database."""
    best: dict[tuple[str, str], float] = {}
    for setting, rate in rates.items():
        key = (setting.rival, setting.database)
        best[key] = max(rate, best.get(key, 0.0))
    return best


def _rows(mine: dict[str, Measured], best: dict[tuple[str, str], float]) -> list[Row]:
    rows = []
    for (rival, database), rate in best.items():
        name = f"decisions a second / {rival}'s on {database}"
        if database in mine:
            rows.append(at_least(name, mine[database].a_second / rate, "ratio", 10))
        else:
            # Without a disk there is nothing durable about it: shown for its ceiling.
            rows.append(Row(f"{name} (ours on SQLite)", mine["SQLite"].a_second / rate, "ratio"))
    return rows


def _ours_table(mine: dict[str, Measured]) -> str:
    return table(
        ("loanmesh, one by one, warm, 64 in flight", "decided a second", "p50 ms", "server CPU ms each"),
        [
            (name, figure(one.a_second), figure(one.p50_ms or 0), figure(one.all_cpu_ms))
            for name, one in mine.items()
        ],
    )  # fmt: skip


def _rivals_table(rates: dict[Setting, float]) -> str:
    header = ("rival", "database", "setting", "decided a second")
    return table(header, [(s.rival, s.database, s.said, figure(rate)) for s, rate in rates.items()])


def _draw(bench: Bench, mine: dict[str, Measured], best: dict[tuple[str, str], float]) -> None:
    own = {f"loanmesh, {name}": one.a_second for name, one in mine.items()}
    others = {f"{rival}, {database}": rate for (rival, database), rate in best.items()}
    title = "Applications decided a second, four steps, 64 in flight"
    pictures.bars(
        bench.pictures / "durable.svg", title, "decided a second (theirs: empty steps)", own | others, list(own)
    )
