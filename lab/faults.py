"""What can go wrong, done on purpose to a mesh seen from outside. Each fault ends by itself, and is bounded in time.

A fault is a coroutine function: it strikes, waits, heals, and answers in a few words what it did ('' where it found
nothing to strike, which then does not count).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field

import aiohttp
import asyncpg

from lab.outside import SERVICES, Outside, Replica
from lab.population import SOURCES
from lab.postgres import Postgres
from lab.proxy import Proxy
from loanmesh.runtime.clock import JUMP, Clock
from loanmesh.runtime.supervised import SUPERVISED

BACK_WITHIN_S = 30.0
LOOK_EVERY_S = 0.1
LOCK_S = 0.3
HEALTHY: dict[str, object] = {
    "dead": False, "hang": False, "garbage": False, "error_rate": 0.0, "latency_ms": 5.0, "jitter_ms": 2.0,
}  # fmt: skip


@dataclass
class World:
    """What faults strike.

    joining   settings that an intake or a bureau needs to join the mesh from outside.
    database  address of intake's database.
    most_s    longest that a fault lasts.
    """

    mesh: Outside
    sandbox: str
    proxies: Sequence[Proxy]
    postgres: Postgres | None
    database: str
    joining: dict[str, str]
    clock: Clock
    dice: random.Random
    lease_s: float
    most_s: float = 3.0
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by faults of the database: two at once would undo each other."""

    def some_s(self) -> float:
        """How long this one lasts."""
        return self.dice.uniform(0.2, self.most_s)

    async def some_replica(self, *services: str) -> Replica:
        """Any replica, of the given services where there are some."""
        return self.dice.choice([r for r in await self.mesh.replicas() if not services or r.service in services])


Fault = Callable[[World], Awaitable[str]]


# --- Processes ---


async def kill(world: World) -> str:
    """SIGKILL one; it is started again by itself."""
    replica = await world.some_replica()
    return f"{replica.name} killed" if replica.signal(signal.SIGKILL) else ""


async def pause(world: World) -> str:
    """SIGSTOP one for a while, so that its leases end while it still thinks it holds them."""
    replica, wait_s = await world.some_replica(), world.some_s()
    if not replica.signal(signal.SIGSTOP):
        return ""
    try:
        await world.clock.sleep(wait_s)
    finally:
        replica.signal(signal.SIGCONT)
    return f"{replica.name} paused for {wait_s:.1f} s"


async def restart(world: World) -> str:
    """SIGTERM one: it drains while its twins claim, and comes back."""
    replica = await world.some_replica(*SERVICES)
    return f"{replica.name} restarted" if replica.signal(signal.SIGTERM) else ""


async def rolling_restart(world: World) -> str:
    """One replica of each service after the other, each back before the next goes."""
    count = 0
    for replica in await world.mesh.replicas():
        if replica.service in SERVICES and replica.signal(signal.SIGTERM):
            count += await is_back(world.mesh, replica, world.clock)
    return f"{count} replicas restarted one by one" if count else ""


async def is_back(mesh: Outside, before: Replica, clock: Clock) -> bool:
    """Wait until a replica serves as a new process; False when it does not in time, or was scaled away."""
    give_up = clock.monotonic() + BACK_WITHIN_S
    while clock.monotonic() < give_up:
        now = next((r for r in await mesh.replicas() if r.name == before.name), None)
        if now is None:
            return False
        if now.pid != before.pid and now.ready:
            return True
        await clock.sleep(LOOK_EVERY_S)
    return False


async def scale(world: World) -> str:
    """One more of a service, or one less."""
    service = world.dice.choice(SERVICES)
    count = sum(r.service == service for r in await world.mesh.replicas())
    wanted = max(1, count - 1) if count > 2 else count + 1
    try:
        await world.mesh.ask({service: wanted})
    except RuntimeError:  # It could not start beside the other faults; the mesh stays as it was.
        return ""
    return f"{service} scaled from {count} to {wanted}"


async def wrong_clock_in_intake(world: World) -> str:
    """An intake joins whose time of day jumps by up to a day, works for some seconds, and is killed."""
    by_s = _some_jump_s(world)
    async with _joined(world, "intake", world.joining | {JUMP: f"3:{by_s}"}) as address:
        await world.clock.sleep(3 + world.some_s())
    return f"an intake with a clock off by {by_s} s took part" if address else ""


async def wrong_clock_in_bureau(world: World) -> str:
    """A bureau joins with such a clock, on the same cache, and an intake with the right time that asks it alone."""
    by_s = _some_jump_s(world)
    async with (
        _joined(world, "bureau", world.joining | {JUMP: f"0:{by_s}"}) as bureau,
        _joined(world, "intake", world.joining | {"INTAKE_BUREAU": bureau}) as address,
    ):
        await world.clock.sleep(2 + world.some_s())
    return f"a bureau with a clock off by {by_s} s took part" if bureau and address else ""


def _some_jump_s(world: World) -> int:
    return world.dice.choice([-86400, -3600, -60, 60, 3600, 86400])


@asynccontextmanager
async def _joined(world: World, service: str, settings: dict[str, str]) -> AsyncIterator[str]:
    """A process of a service beside those of the mesh, killed or ended at the end; its address, '' when it failed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"services.{service}.main",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={
            **os.environ,
            f"{service.upper()}_TLS__MODE": "plaintext",
            f"{service.upper()}_SERVER__LISTEN": "127.0.0.1:0",
            **settings,
            SUPERVISED: "1",
        },
    )  # fmt: skip
    try:
        assert process.stdout
        ready = await process.stdout.readline()
        yield str(json.loads(ready)["address"]) if ready else ""
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(world.dice.choice([signal.SIGKILL, signal.SIGTERM]))
        await process.wait()


# --- Sources ---


async def set_source(world: World, source: str, change: dict[str, object]) -> bool:
    """Change how a source behaves; whether the sandbox was there to hear."""
    url = f"http://{world.sandbox}/control/faults"
    timeout = aiohttp.ClientTimeout(total=5)
    with suppress(aiohttp.ClientError, TimeoutError):
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(url, json={"source": source, **change}) as answer,
        ):
            return answer.status == 200
    return False


def _source(what: str, change: dict[str, object]) -> Fault:
    async def strike(world: World) -> str:
        source, wait_s = world.dice.choice(SOURCES), world.some_s()
        if not await set_source(world, source, change):
            return ""
        try:
            await world.clock.sleep(wait_s)
        finally:
            await set_source(world, source, HEALTHY)
        return f"{source} {what} for {wait_s:.1f} s"

    strike.__doc__ = f"A source is {what} for a while."
    return strike


# --- Connections ---


async def cut_connections(world: World) -> str:
    """All connections through one proxy are reset, several times."""
    proxy, count = world.dice.choice(world.proxies), 0
    for _ in range(world.dice.randint(1, 5)):
        count += proxy.cut()
        await world.clock.sleep(0.2)
    return f"{count} connections cut" if count else ""


async def delay_connections(world: World) -> str:
    """Everything through one proxy comes later."""
    proxy, wait_s = world.dice.choice(world.proxies), world.some_s()
    proxy.delay_s = world.dice.uniform(0.02, 0.5)
    try:
        await world.clock.sleep(wait_s)
        return f"connections slower by {proxy.delay_s * 1000:.0f} ms for {wait_s:.1f} s"
    finally:
        proxy.delay_s = 0.0


async def swallow_connections(world: World) -> str:
    """Nothing comes through one proxy for a while; connections stay open."""
    proxy, wait_s = world.dice.choice(world.proxies), world.some_s()
    proxy.swallow()
    try:
        await world.clock.sleep(wait_s)
    finally:
        proxy.flow()
    return f"connections silent for {wait_s:.1f} s"


# --- SQLite's disk ---


async def full_disk(world: World) -> str:
    """No intake can write to any file, its log neither, as on a full disk, until there is room again."""
    replicas = [r for r in await world.mesh.replicas() if r.service == "intake"]
    wait_s, struck = world.some_s(), []
    for replica in replicas:
        with suppress(ProcessLookupError):
            before = resource.prlimit(replica.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(replica.pid, resource.RLIMIT_FSIZE, (0, before[1]))
            struck.append((replica.pid, before))
    try:
        await world.clock.sleep(wait_s)
    finally:
        for pid, before in struck:
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    return f"disk full for {wait_s:.1f} s" if struck else ""


async def slow_disk(world: World) -> str:
    """Somebody else holds the database's one write lock most of the time: each commit takes some 0.3 s."""
    path, ends_at = world.database.removeprefix("sqlite:///"), world.clock.monotonic() + world.some_s()
    count = 0
    while world.clock.monotonic() < ends_at:
        with suppress(sqlite3.OperationalError):
            await asyncio.to_thread(_hold_lock, path)
            count += 1
        await world.clock.sleep(0.03)
    return f"{count} commits of others took 0.3 s" if count else ""


def _hold_lock(path: str) -> None:
    # All in one thread, so that a cancelled run leaves no lock behind.
    with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(LOCK_S)
        connection.execute("ROLLBACK")


# --- PostgreSQL ---


async def stop_database(world: World) -> str:
    """The server dies at once, and comes back."""
    assert world.postgres
    async with world.alone:
        wait_s = world.some_s()
        await world.postgres.crash()
        try:
            await world.clock.sleep(wait_s)
        finally:
            await world.postgres.start()
    return f"PostgreSQL down for {wait_s:.1f} s"


async def stop_database_in_takeover(world: World) -> str:
    """An intake dies; just as its leases end and another claims its work, the server dies, too."""
    assert world.postgres
    async with world.alone:
        replica = await world.some_replica("intake")
        if not replica.signal(signal.SIGKILL):
            return ""
        await world.clock.sleep(world.lease_s + world.dice.uniform(-0.2, 0.5))
        await world.postgres.crash()
        await world.postgres.start()
    return f"{replica.name} killed, and PostgreSQL as its leases ended"


async def pause_database(world: World) -> str:
    """Every process of the server stands still."""
    assert world.postgres
    async with world.alone:
        wait_s = world.some_s()
        world.postgres.signal_all(signal.SIGSTOP)
        try:
            await world.clock.sleep(wait_s)
        finally:
            world.postgres.signal_all(signal.SIGCONT)
    return f"PostgreSQL paused for {wait_s:.1f} s"


async def cut_database(world: World) -> str:
    """The server ends all connections of intake."""
    assert world.postgres
    async with world.alone:
        with suppress(OSError, asyncpg.PostgresError, TimeoutError):
            return f"{await world.postgres.cut_connections(world.database)} database connections cut"
    return ""


ON_ALL: dict[str, Fault] = {
    "kill": kill,
    "pause": pause,
    "restart": restart,
    "rolling_restart": rolling_restart,
    "scale": scale,
    "wrong_clock_in_intake": wrong_clock_in_intake,
    "wrong_clock_in_bureau": wrong_clock_in_bureau,
    "source_slow": _source("slow", {"latency_ms": 800.0, "jitter_ms": 400.0}),
    "source_erring": _source("erring", {"error_rate": 0.7}),
    "source_hanging": _source("hanging", {"hang": True}),
    "source_talking_nonsense": _source("talking nonsense", {"garbage": True}),
    "source_dead": _source("dead", {"dead": True}),
    "cut_connections": cut_connections,
    "delay_connections": delay_connections,
    "swallow_connections": swallow_connections,
}
ON_SQLITE: dict[str, Fault] = {"full_disk": full_disk, "slow_disk": slow_disk}
ON_POSTGRES: dict[str, Fault] = {
    "stop_database": stop_database,
    "stop_database_in_takeover": stop_database_in_takeover,
    "pause_database": pause_database,
    "cut_database": cut_database,
}


async def heal(world: World) -> None:
    """Undo whatever may still be broken, e.g. at a source whose sandbox was away when its fault ended."""
    for proxy in world.proxies:
        proxy.delay_s = 0.0
        proxy.flow()
    give_up = world.clock.monotonic() + BACK_WITHIN_S
    while not await set_source(world, "*", HEALTHY) and world.clock.monotonic() < give_up:
        await world.clock.sleep(LOOK_EVERY_S)
    for replica in await world.mesh.replicas():
        replica.signal(signal.SIGCONT)
