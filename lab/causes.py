"""`make causes`: ten troubles planted in a real mesh, one after the other; is each named first by `why-failed`?

    python -m lab.causes [--only NAME[,NAME...]]

Each is planted while synthetic applications come in, then the real command is asked for the time since. Ends with 1
where fewer than nine in ten are named. A person's own trouble is not in it: what the caller alone does wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import random
import resource
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb

from lab.audit import pending
from lab.drills import free_base
from lab.faults import HEALTHY, World, set_source
from lab.outside import Outside, Replica
from lab.population import Population
from loanmesh.client import CallFailed, Client, Unreachable
from loanmesh.client.security import Security
from loanmesh.runtime import telemetry
from loanmesh.runtime.clock import Clock, SystemClock, new_owner
from loanmesh.runtime.settings import TelemetrySettings

LEASE_S = 2.0
NAMED_WITHIN_S = 20.0
"""How long after the trouble the command may take to name it: leases end, and telemetry is sent once a second."""
QUIET_WITHIN_S = 40.0
PATIENCE_S = 2.0
GREEDY, TOO_MANY = "greedy", 60
NEEDED = 0.9


@dataclass
class Mesh:
    """A running mesh, and what is needed to trouble it."""

    outside: Outside
    address: str
    sandbox: str
    world: World
    clock: Clock
    security: Security | None = None
    sent: int = 0

    def client(self, client_id: str = "caller", patience_s: float = PATIENCE_S) -> Client:
        """A caller of the mesh."""
        return Client(self.address, client_id=client_id, patience_s=patience_s, security=self.security)

    async def submit(self, client: Client, count: int, deadline_s: float | None = None) -> list[str]:
        """Send applications of people nobody has asked about before; the names of those that were stored."""
        population = Population()

        async def one(index: int) -> str:
            said = population.application("person", index, self.clock.now())
            application = json_format.ParseDict(said, pb.Application())
            with suppress(CallFailed, Unreachable):
                return (await client.submit(application, deadline_s=deadline_s)).name
            return ""

        first, self.sent = self.sent, self.sent + count
        return [name for name in await asyncio.gather(*(one(first + n) for n in range(count))) if name]

    async def replica(self, name: str) -> Replica:
        """One process, by its name."""
        return next(one for one in await self.outside.replicas() if one.name == name)

    @property
    def database(self) -> Path:
        """Intake's."""
        return self.outside.state / "intake.db"


Plant = Callable[[Mesh], Awaitable[float | None]]
"""Answers when the trouble began, seconds since 1970; None: when it was planted."""


@dataclass(frozen=True)
class Trouble:
    """What is planted, and the kind of cause that the command must name first."""

    name: str
    kinds: tuple[str, ...]
    hop: str
    plant: Plant
    tls: bool = False


# --- The troubles ---


async def source_down(mesh: Mesh) -> None:
    """The court's service resets every connection."""
    await _with_source(mesh, "court", {"dead": True})


async def source_slow(mesh: Mesh) -> None:
    """The tax authority takes three seconds; a profile waits for one."""
    await _with_source(mesh, "tax", {"latency_ms": 3000.0})


async def bad_certificate(mesh: Mesh) -> None:
    """Scoring comes back with a certificate that another authority has signed."""
    folder = mesh.outside.state / "certs" / "services" / "scoring"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    with tempfile.TemporaryDirectory() as elsewhere:
        await _run("certs", "init", "--dir", elsewhere)
        await _run("certs", "issue", "service", "scoring", "--dir", elsewhere)
        foreign = Path(elsewhere) / "services" / "scoring"
        for name in ("tls.crt", "tls.key"):
            (folder / name).write_bytes((foreign / name).read_bytes())
    try:
        scoring = await mesh.replica("scoring")
        scoring.signal(signal.SIGTERM)
        await _back(mesh, scoring)
        async with mesh.client() as client:
            await mesh.submit(client, 20)
            await mesh.clock.sleep(3.0)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
        (await mesh.replica("scoring")).signal(signal.SIGTERM)


async def full_budget(mesh: Mesh) -> None:
    """A caller sends twenty times what its budget allows: each of two intakes lets one batch that exceeds it pass."""
    async with mesh.client(GREEDY, patience_s=0.5) as client:
        await mesh.submit(client, TOO_MANY)


async def killed_replica(mesh: Mesh) -> None:
    """An intake dies with applications in hand."""
    await _with_work_in_hand(mesh, lambda replica: replica.signal(signal.SIGKILL))


async def paused_replica(mesh: Mesh) -> None:
    """An intake stands still for longer than its leases."""
    replica = await mesh.replica("intake-2")
    try:
        await _with_work_in_hand(mesh, lambda one: one.signal(signal.SIGSTOP))
        await mesh.clock.sleep(2 * LEASE_S)
    finally:
        replica.signal(signal.SIGCONT)


async def poisoned_application(mesh: Mesh) -> float:
    """A stored application cannot be read any more.

    It has to wait for something to be struck; the trouble begins when what it waited for is back.
    """
    await set_source(mesh.world, "court", {"dead": True})
    try:
        async with mesh.client() as client:
            await mesh.submit(client, 1)
        for _ in range(50):
            with closing(sqlite3.connect(mesh.database, timeout=10)) as database, database:
                struck = database.execute(
                    "UPDATE application SET payload = X'ff' WHERE state = 'PENDING' AND owner IS NULL RETURNING id"
                ).fetchall()
            if struck:
                break
            await mesh.clock.sleep(0.1)
        else:
            raise RuntimeError("nothing waited for the court, so that there was nothing to poison")
    finally:
        began = mesh.clock.now().timestamp()
        await set_source(mesh.world, "court", HEALTHY)
    while await pending(mesh.world.database):
        await mesh.clock.sleep(0.1)
    return began


async def slow_database(mesh: Mesh) -> None:
    """Somebody else holds the database's one write lock for a second at a time."""
    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            held = closing(sqlite3.connect(mesh.database, timeout=30, isolation_level=None))
            with held as database, suppress(sqlite3.OperationalError):
                database.execute("BEGIN IMMEDIATE")
                stop.wait(1.2)
                database.execute("ROLLBACK")
            stop.wait(0.1)

    holding = asyncio.create_task(asyncio.to_thread(hold))
    try:
        async with mesh.client(patience_s=20) as client:
            for _ in range(4):
                await mesh.submit(client, 5)
    finally:
        stop.set()
        await holding


async def full_disk(mesh: Mesh) -> None:
    """No intake can write to any file."""
    struck = []
    for replica in await mesh.outside.replicas():
        if replica.service == "intake":
            before = resource.prlimit(replica.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(replica.pid, resource.RLIMIT_FSIZE, (0, before[1]))
            struck.append((replica.pid, before))
    try:
        async with mesh.client() as client:
            await mesh.submit(client, 20)
    finally:
        for pid, before in struck:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def expired_deadline(mesh: Mesh) -> None:
    """A caller gives each call one millisecond."""
    async with mesh.client() as client:
        await mesh.submit(client, 1)  # Connects.
        for _ in range(10):
            await mesh.submit(client, 2, deadline_s=0.001)


TROUBLES = (
    Trouble("source_down", ("source_down",), "bureau -> court", source_down),
    Trouble("source_slow", ("source_slow",), "bureau -> tax", source_slow),
    Trouble("full_budget", ("budget_full",), "caller -> intake", full_budget),
    Trouble("killed_replica", ("replica_died",), "intake", killed_replica),
    Trouble("paused_replica", ("replica_paused",), "intake", paused_replica),
    Trouble("poisoned_application", ("poisoned_application",), "intake -> open", poisoned_application),
    Trouble("slow_database", ("database_slow",), "intake -> database", slow_database),
    Trouble("full_disk", ("disk_full",), "intake -> database", full_disk),
    Trouble("expired_deadline", ("deadline_expired",), "caller -> intake", expired_deadline),
    Trouble("bad_certificate", ("bad_certificate",), "intake -> scoring", bad_certificate, tls=True),
)


async def _with_source(mesh: Mesh, source: str, change: dict[str, object]) -> None:
    await set_source(mesh.world, source, change)
    try:
        async with mesh.client() as client:
            for _ in range(4):
                await mesh.submit(client, 5)
                await mesh.clock.sleep(0.5)
    finally:
        await set_source(mesh.world, source, HEALTHY)


async def _with_work_in_hand(mesh: Mesh, strike: Callable[[Replica], object]) -> None:
    # Each source takes a while, so that whoever is struck has applications under way.
    await set_source(mesh.world, "*", {"latency_ms": 400.0, "jitter_ms": 0.0})
    replica = await mesh.replica("intake-2")
    try:
        # To this one alone, so that it holds them.
        async with Client(replica.address, client_id="caller", patience_s=PATIENCE_S, security=mesh.security) as client:
            await mesh.submit(client, 20)
            strike(replica)
        await mesh.clock.sleep(LEASE_S + 1.5)
    finally:
        await set_source(mesh.world, "*", HEALTHY)


async def _back(mesh: Mesh, before: Replica) -> None:
    give_up = mesh.clock.monotonic() + QUIET_WITHIN_S
    while mesh.clock.monotonic() < give_up:
        now = await mesh.replica(before.name)
        if now.pid != before.pid and now.ready:
            return
        await mesh.clock.sleep(0.1)


# --- The run ---


@dataclass(frozen=True)
class Verdict:
    """What the command said of one trouble."""

    trouble: Trouble
    named: bool
    said: Sequence[dict[str, Any]]
    """Its groups, as JSON."""


async def look(mesh: Mesh, trouble: Trouble) -> Verdict:
    """Plant it, and ask the command until it names it, or for too long."""
    began = mesh.clock.now().timestamp()
    began = await trouble.plant(mesh) or began
    give_up = mesh.clock.monotonic() + NAMED_WITHIN_S
    while True:
        said = await why_failed(mesh, began)
        first = said[0]["cause"] if said else {"kind": "", "hop": ""}
        named = first["kind"] in trouble.kinds and first["hop"].startswith(trouble.hop)
        if named or mesh.clock.monotonic() > give_up:
            return Verdict(trouble, named, said)
        await mesh.clock.sleep(0.5)


async def why_failed(mesh: Mesh, since: float) -> list[dict[str, Any]]:
    """What `loanmesh why-failed` answers for the time since then."""
    at = dt.datetime.fromtimestamp(since, dt.UTC).isoformat()
    words = ("why-failed", "--since", at, "--state", str(mesh.outside.state), "--json")
    answered: list[dict[str, Any]] = json.loads(await _run(*words))
    return answered


async def _run(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loanmesh", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, complaint = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"loanmesh {' '.join(words)} ended with {process.returncode}: {complaint.decode()}")
    return out.decode()


@asynccontextmanager
async def running(folder: Path, base: int, tls: bool, clock: Clock) -> AsyncIterator[Mesh]:
    """A small mesh with two intakes; its callers' spans go where its own go."""
    words = ["--port-base", str(base), "--replicas", "intake=2", *(["--tls"] if tls else [])]
    settings = {
        "INTAKE_LEASE__DURATION_S": f"{LEASE_S:g}",
        "INTAKE_QUOTA__CLIENTS": json.dumps({GREEDY: {"a_second": 1, "burst": 3}}),
        "INTAKE_PARKING__WAIT_S_FIRST": "0.1",
        "INTAKE_PARKING__WAIT_S_MAX": "0.5",
    }
    outside = Outside(folder / "state", words, settings)
    ready = await outside.start()
    certs = Path(str(ready["certs"])) if tls else None
    world = World(
        outside, str(ready["parts"]["sandbox"]["address"]), (), None, f"sqlite:///{outside.state / 'intake.db'}", {},
        clock, random.Random(0), LEASE_S,
    )  # fmt: skip
    security = Security.in_folder(certs / "clients" / "local") if certs else None
    try:
        yield Mesh(outside, str(ready["targets"]["intake"]), world.sandbox, world, clock, security)
    finally:
        await outside.stop()


async def quiet(mesh: Mesh) -> None:
    """Wait until nothing is left of the last trouble, and all that tells of it has been sent."""
    give_up = mesh.clock.monotonic() + QUIET_WITHIN_S
    while mesh.clock.monotonic() < give_up:
        ready = all(replica.ready for replica in await mesh.outside.replicas())
        if ready and await pending(mesh.world.database) == 0:
            break
        await mesh.clock.sleep(0.3)
    await mesh.clock.sleep(2.0)


async def run(troubles: Sequence[Trouble], folder: Path, clock: Clock, say: Callable[[str], None]) -> list[Verdict]:
    """Plant each in turn; what was said of each."""
    base = free_base()
    telemetry.start_telemetry(
        "caller", new_owner("caller"), TelemetrySettings(otlp_endpoint=f"127.0.0.1:{base + 5}", log_level="error")
    )
    verdicts = []
    try:
        for tls in (False, True):
            chosen = [trouble for trouble in troubles if trouble.tls is tls]
            if not chosen:
                continue
            async with running(folder / ("tls" if tls else "plain"), base, tls, clock) as mesh:
                for trouble in chosen:
                    verdict = await look(mesh, trouble)
                    verdicts.append(verdict)
                    say(_line(verdict))
                    await quiet(mesh)
    finally:
        telemetry.stop_telemetry()
    return verdicts


def _line(verdict: Verdict) -> str:
    mark = "named" if verdict.named else "NOT NAMED"
    first = verdict.said[0] if verdict.said else None
    text = f"{first['count']} x {first['cause']['what']} ({first['cause']['hop']})" if first else "nothing"
    rest = "".join(f"; then {one['count']} x {one['cause']['kind']}" for one in verdict.said[1:3])
    return f"{verdict.trouble.name:<22} {mark:<10} {text}{rest}"


def main() -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [trouble.name for trouble in TROUBLES]
    parser.add_argument("--only", default=",".join(names), help="troubles to plant, with commas")
    asked = parser.parse_args().only.split(",")
    if unknown := set(asked) - set(names):
        parser.error(f"no trouble {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [trouble for trouble in TROUBLES if trouble.name in asked]
    with tempfile.TemporaryDirectory(prefix="causes-") as folder:
        verdicts = asyncio.run(run(chosen, Path(folder), SystemClock(), lambda line: print(line, flush=True)))
    named = sum(verdict.named for verdict in verdicts)
    print(f"{named} of {len(verdicts)} causes named first (wanted: nine of ten)")
    return 0 if named >= NEEDED * len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
