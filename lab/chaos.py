"""Applications under fire: thousands are submitted while faults strike at random; then every promise is checked.

    python -m lab.chaos [--applications 100000] [--faults 420] [--seed N] [--database sqlite|postgres|both]

The load goes through the client library, the faults come from `faults.py`, what callers saw is judged by `history.py`,
and the databases by `audit.py` as a second witness. The seed repeats the choices; processes keep their own time.
Writes build/chaos.json and ends with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import drills, faults
from lab.audit import audit, pending
from lab.history import Record, Recorder
from lab.judge import by_rule, check
from lab.load import Callers
from lab.outside import Outside
from lab.postgres import Postgres
from lab.proxy import Proxy
from lab.rows import Row, at_least, at_most, write_rows
from loanmesh.client import Client
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.runtime.keys import Keys, read_ring
from loanmesh.runtime.sealed import Sealer

LEASE_S = 2.0
TWO_EACH = "intake=2,bureau=2,scoring=2,pricing=2"
STRIKERS = 2
"""Faults at once."""
PAUSE_S = 0.5
"""Longest pause of a striker between two faults."""
DECIDED_WITHIN_S = 180.0
SAY_EVERY_S = 5.0
SAMPLE = 300
MANY, SINGLE, READERS = 4, 4, 3
"""Callers of each kind."""


@dataclass(frozen=True)
class Plan:
    """One run: on which database, how many applications, how many faults, from which seed."""

    database: str
    applications: int
    faults: int
    seed: int


Say = Callable[[str], None]


@asynccontextmanager
async def under_fire(plan: Plan, folder: Path, clock: Clock, dice: random.Random) -> AsyncIterator[faults.World]:
    """A mesh with two replicas of each service, proxies before it and inside it, and nothing broken yet."""
    base = drills.free_base()
    pricing = [Proxy(f"127.0.0.{n}:{base + 3}", clock) for n in (1, 2)]
    front = [Proxy(f"127.0.0.{n}:{base}", clock) for n in (1, 2)]
    postgres = Postgres(folder / "postgres") if plan.database == "postgres" else None
    try:
        for proxy in (*pricing, *front):
            await proxy.start()
        database = f"sqlite:///{folder / 'state' / 'intake.db'}"
        words = ["--port-base", str(base), "--replicas", TWO_EACH]
        if postgres:
            await postgres.start()
            database = await postgres.new_database("chaos")
            words += ["--database", database]
        settings = {
            "INTAKE_LEASE__DURATION_S": f"{LEASE_S:g}",
            "INTAKE_PRICING": ",".join(proxy.address for proxy in pricing),
        }
        mesh = Outside(folder / "state", words, settings)
        try:
            ready = await mesh.start()
            joining = settings | {
                "INTAKE_DATABASE_URL": database,
                "INTAKE_PRIVACY__KEYS_FILE": str(folder / "state" / "intake-keys.json"),
                "BUREAU_PRIVACY__KEYS_FILE": str(folder / "state" / "bureau-keys.json"),
                "INTAKE_BUREAU": ready["targets"]["bureau"],
                "INTAKE_SCORING": ready["targets"]["scoring"],
            }
            sandbox = str(ready["parts"]["sandbox"]["address"])
            joining |= {
                "BUREAU_DATABASE_URL": database.replace("/intake.db", "/bureau.db"),
                "BUREAU_SOURCES_URL": f"http://{sandbox}",
            }
            yield faults.World(mesh, sandbox, [*pricing, *front], postgres, database, joining, clock, dice, LEASE_S)
        finally:
            await mesh.stop()
    finally:
        for proxy in (*pricing, *front):
            await proxy.stop()
        if postgres:
            await postgres.stop()


async def run(plan: Plan, folder: Path, clock: Clock, say: Say) -> list[Row]:
    """Load and faults, then rest, then judgement."""
    dice = random.Random(plan.seed)
    recorder = Recorder(clock.monotonic)
    async with under_fire(plan, folder, clock, dice) as world:
        struck: Counter[str] = Counter()
        front = ",".join(proxy.address for proxy in world.proxies[2:])
        callers = Callers(
            [(await world.mesh.ask({}))["targets"]["intake"], front], plan.applications, recorder, clock, dice,
            # A step ahead of the faults, so that there is always something for them to hit.
            lambda: plan.applications * (struck.total() + 2) / max(1, plan.faults),
        )  # fmt: skip
        started = clock.monotonic()
        telling = asyncio.create_task(_tell(plan, callers, struck, world, clock, say))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(callers.run(MANY, SINGLE, READERS))
                for _ in range(STRIKERS):
                    group.create_task(_strike(world, plan.faults, struck, say))
        finally:
            telling.cancel()
        await faults.heal(world)
        undecided = await _rest(world, clock)
        took_s = clock.monotonic() - started
        say(f"{plan.database}: {callers.acknowledged} acknowledged in {took_s:.0f} s, {struck.total()} faults; judging")
        target = (await world.mesh.ask({}))["targets"]["intake"]
        await _ask_sample(target, recorder, dice)
        sealer = Sealer(Keys(read_ring(folder / "state" / "intake-keys.json"), clock))
        witness = await audit(world.database, clock.monotonic(), sealer)
        crashes = world.mesh.crashes()
    return _judge(plan, callers, struck, undecided, crashes, took_s, [*recorder.records, *witness.records], say)


async def _strike(world: faults.World, count: int, struck: Counter[str], say: Say) -> None:
    able = faults.ON_ALL | (faults.ON_POSTGRES if world.postgres else faults.ON_SQLITE)
    names = sorted(able)
    while struck.total() < count:
        await world.clock.sleep(world.dice.uniform(0, PAUSE_S))
        # Those that struck least come first, so that a short run sees every kind.
        least = min(struck[name] for name in names)
        name = world.dice.choice([name for name in names if struck[name] <= least + 1])
        done = await able[name](world)
        if done:
            struck[name] += 1
            say(f"    {done}")
        else:
            await world.clock.sleep(PAUSE_S)


async def _rest(world: faults.World, clock: Clock) -> int:
    """Wait until nothing is pending; what still is when the wait is over."""
    give_up = clock.monotonic() + DECIDED_WITHIN_S
    while (left := await pending(world.database)) and clock.monotonic() < give_up:
        await clock.sleep(0.5)
    return left


async def _tell(
    plan: Plan, callers: Callers, struck: Counter[str], world: faults.World, clock: Clock, say: Say
) -> None:
    while True:
        await clock.sleep(SAY_EVERY_S)
        say(
            f"{plan.database}: {callers.acknowledged}/{plan.applications} acknowledged,"
            f" {struck.total()}/{plan.faults} faults, {len(callers.failed)} failed calls"
        )


async def _ask_sample(target: str, recorder: Recorder, dice: random.Random) -> None:
    """What the mesh itself says at the end of some: the second witness must agree with it."""
    names = sorted({record.name for record in recorder.records if hasattr(record, "name")})
    async with Client(target, client_id="auditor") as client:
        for name in dice.sample(names, min(SAMPLE, len(names))):
            application = await client.get(name)
            recorder.read("auditor", application)
            told = await client.history(name)
            recorder.told(name, told.events, told.chain_intact)


def _judge(
    plan: Plan,
    callers: Callers,
    struck: Counter[str],
    undecided: int,
    crashes: Sequence[str],
    took_s: float,
    history: Sequence[Record],
    say: Say,
) -> list[Row]:
    found = by_rule(check(history))
    for rule, violations in found.items():
        for violation in violations[:3]:
            say(f"VIOLATION {violation}")
        say(f"{rule}: {len(violations)} violations")
    for failure in [*callers.failed, *crashes][:10]:
        say(f"FAILED {failure}")
    promised = ("nothing_is_lost", "decided_once", "declines_rest_on_evidence")
    others = sum(len(violations) for rule, violations in found.items() if rule not in promised)
    on = f"{plan.database}: "
    return [
        at_least(on + "applications acknowledged under fire", callers.acknowledged, "applications", plan.applications),
        at_least(on + "faults struck", struck.total(), "faults", plan.faults),
        at_most(on + "acknowledged applications lost", len(found.get(promised[0], ())), "applications", 0),
        at_most(on + "decided twice", len(found.get(promised[1], ())), "applications", 0),
        at_most(on + "declines on missing or out-of-date evidence", len(found.get(promised[2], ())), "declines", 0),
        at_most(on + "other contradictions in what callers saw", others, "violations", 0),
        at_most(on + "failed client calls", len(callers.failed), "calls", 0),
        at_most(on + "undecided after the last fault", undecided, "applications", 0),
        at_most(on + "processes that crashed by themselves", len(crashes), "processes", 0),
        Row(on + "whole run, waits included", round(took_s, 1), "s", "", True),
    ]


async def chaos(plans: Sequence[Plan], with_drills: bool, keep: Path | None, clock: Clock, say: Say) -> list[Row]:
    """All runs, one after the other. `keep`: where logs and databases stay; None: nowhere."""
    rows: list[Row] = []
    for plan in plans:
        say(f"{plan.database}: {plan.applications} applications, {plan.faults} faults, seed {plan.seed}")
        with _folder(keep, plan.database) as folder:
            rows += await run(plan, folder, clock, say)
    if with_drills:
        with _folder(keep, "drills") as folder:
            rows += await drills.run(folder, clock, say)
    return rows


@contextmanager
def _folder(keep: Path | None, name: str) -> Iterator[Path]:
    if keep:
        (keep / name).mkdir(parents=True)
        yield keep / name
    else:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            yield Path(folder)


def main() -> None:
    """Read the command line, run, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applications", type=int, default=100_000, help="in all, shared by the databases")
    parser.add_argument("--faults", type=int, default=420, help="in all, shared by the databases")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--database", choices=("sqlite", "postgres", "both"), default="both")
    parser.add_argument("--no-drills", action="store_true", help="leave out pauses, kills and restarts under measure")
    parser.add_argument("--keep", type=Path, help="new folder in which logs and databases stay, to look at")
    parser.add_argument("--out", type=Path, default=Path("build/chaos.json"))
    asked = parser.parse_args()
    databases = ("sqlite", "postgres") if asked.database == "both" else (asked.database,)
    plans = [
        Plan(database, asked.applications // len(databases), asked.faults // len(databases), asked.seed)
        for database in databases
    ]
    clock = SystemClock()
    started = clock.monotonic()

    def say(line: str) -> None:
        print(f"{clock.monotonic() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    try:
        rows = asyncio.run(chaos(plans, not asked.no_drills, asked.keep, clock, say))
    except KeyboardInterrupt:
        say(f"stopped; nothing is left running. Seed {asked.seed}")
        sys.exit(130)
    write_rows(asked.out, rows)
    say(f"seed {asked.seed}; wrote {asked.out}")
    sys.exit(not all(row.met for row in rows))


if __name__ == "__main__":
    main()
