"""Planted bugs: each swaps one piece of the real code for a wrong one that somebody could have written.

    python -m lab.simulator.mutants [NAME ...] [--seeds N]

A simulator that finds nothing proves nothing; one that finds all of these has earned some trust. Each is tried on the
same seeds, from the first, until a rule is broken. One that outlives them all ends the run with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1.pricing_service_pb2 import Pricing

from lab.history import by_rule
from lab.simulator import database, replica
from lab.simulator.world import World, simulate
from loanmesh.runtime import breaker, deadline
from loanmesh.runtime.database import Script, Statement
from loanmesh.runtime.errors import DependencyDown
from services.bureau import freshness, gather, profile
from services.intake import mesh, pipeline, store, worker
from services.intake import watch as watching
from services.intake.application import Claim, New, Snapshot, State, Stored

SEEDS = 600
"""How many seeds a mutant may survive."""


class DoesNotFit(Exception):
    """The code has changed so that a planted bug has no place any more: plant it anew."""


@contextmanager
def swapped(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    """Put something wrong in a place of the real code."""
    if not hasattr(owner, name):
        raise DoesNotFit(f"{owner} has no {name}")
    before = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def reworded(owner: Any, names: Sequence[str], right: str, wrong: str) -> Iterator[None]:
    """Change a phrase in statements of the real code."""
    with ExitStack() as stack:
        for name in names:
            text = getattr(owner, name)
            if right not in text:
                raise DoesNotFit(f"{name} does not say {right!r}")
            stack.enter_context(swapped(owner, name, text.replace(right, wrong)))
        yield


@contextmanager
def without_key(metadata_has: str, right: str) -> Iterator[None]:
    """Make tables without one of their keys."""
    real = database.ddl

    def wrong(*args: Any) -> list[str]:
        statements = real(*args)
        if any(metadata_has in s for s in statements) and not any(right in s for s in statements):
            raise DoesNotFit(f"no table has {right!r}")
        return [statement.replace(right, "CHECK (1)") for statement in statements]

    database.blank.cache_clear()
    try:
        with swapped(database, "ddl", wrong):
            yield
    finally:
        database.blank.cache_clear()


# --- The store ---


@contextmanager
def acknowledge_before_commit() -> Iterator[None]:
    """Answers while the transaction is still on its way, and shows callers what it remembers."""
    real_accept, real_get = store.Store.accept, store.Store.get

    async def accept(self: store.Store, batch: Sequence[tuple[New, bool]]) -> list[Stored]:
        remembered = self.__dict__.setdefault("_remembered", {})

        async def later() -> None:
            with contextlib.suppress(DependencyDown):
                await real_accept(self, [(new, False) for new, _ in batch])

        asyncio.get_running_loop().create_task(later())
        remembered.update({new.id: new for new, _ in batch})
        return [Stored(new.id, new.payload_hash, False) for new, _ in batch]

    async def get(self: store.Store, lender: str, application_id: str) -> Snapshot:
        try:
            return await real_get(self, lender, application_id)
        except store.NotFound:
            new: New | None = self.__dict__.get("_remembered", {}).get(application_id)
            if new is None:
                raise
            return Snapshot(
                new.id, lender, new.payload, State.PENDING, 0.0, (), (), None, 1, "", 1, new.created_at,
                new.created_at, None, new.priority,
            )  # fmt: skip

    with swapped(store.Store, "accept", accept), swapped(store.Store, "get", get):
        yield


@contextmanager
def no_fence() -> Iterator[None]:
    """Commits without asking whether the lease is still its own; revision and state still guard."""
    with reworded(store, ["_DECIDE", "_AWAIT", "_DEFER"], "AND fence = ?", "AND ? IS NOT NULL"):
        yield


@contextmanager
def no_fence_and_no_revision() -> Iterator[None]:
    """Commits whenever the application is pending, whatever happened meanwhile: the chain of events forks."""
    with (
        no_fence(),
        reworded(store, ["_DECIDE", "_AWAIT", "_DEFER"], "AND revision = ?", "AND ? IS NOT NULL"),
    ):
        yield


@contextmanager
def no_once() -> Iterator[None]:
    """Neither fence nor state nor primary key make the decision the only one."""
    with (
        no_fence_and_no_revision(),
        reworded(store, ["_DECIDE"], "AND state = 'PENDING'", ""),
        without_key("CREATE TABLE decision", "PRIMARY KEY (application_id, assessment)"),
        without_key("CREATE TABLE event", "PRIMARY KEY (application_id, seq)"),
    ):
        yield


@contextmanager
def request_stored_twice() -> Iterator[None]:
    """Does not look whether a request_id was stored before."""
    conflict = "ON CONFLICT (lender, client_id, request_id) DO NOTHING"
    key = "CONSTRAINT application_request UNIQUE (lender, client_id, request_id)"
    with reworded(store, ["_INSERT"], conflict, ""), without_key("CREATE TABLE application", key):
        yield


@contextmanager
def lease_by_local_clock() -> Iterator[None]:
    """Leases begin and end by the clock of whichever replica looks."""
    with reworded_now("(sim_now() + sim_skew())"):
        yield


@contextmanager
def reworded_now(wrong: str) -> Iterator[None]:
    """Give statements another clock."""
    before = database._WORDS["{now}"]
    database._WORDS["{now}"] = wrong
    database._text.cache_clear()
    try:
        yield
    finally:
        database._WORDS["{now}"] = before
        database._text.cache_clear()


@contextmanager
def claims_what_is_held() -> Iterator[None]:
    """Takes over before the lease has ended."""
    with reworded(store, ["_CLAIM_URGENT", "_CLAIM_OLDEST"], "lease_until < {now}", "lease_until < {now} + 2"):
        yield


@contextmanager
def renews_a_lost_lease() -> Iterator[None]:
    """Renews whatever it once held, also what another replica has taken over."""
    with reworded(store, ["_RENEW"], "AND fence = ? AND owner = ?", "AND ? IS NOT NULL AND ? IS NOT NULL"):
        yield


@contextmanager
def defers_without_a_wait() -> Iterator[None]:
    """What cannot be decided now is looked at again at once, and again."""
    with reworded(store, ["_DEFER"], "ELSE {now} + ? END", "ELSE {now} + 0 * ? END"):
        yield


@contextmanager
def priority_inversion() -> Iterator[None]:
    """Claims what is least urgent first."""
    with reworded(store, ["_CLAIM_URGENT"], "ORDER BY priority,", "ORDER BY priority DESC,"):
        yield


@contextmanager
def decision_and_event_apart() -> Iterator[None]:
    """Commits the decision in one transaction and tells of it in another."""
    real_record, real_settle = store._record, store.Store.settle
    untold: list[tuple[Any, set[str]]] = []

    def record(events: Any, ours: set[str]) -> Script[None]:
        untold.append((events, ours))
        yield Statement("SELECT 1 WHERE ? = 0", [(1,)])

    async def settle(self: store.Store, results: Sequence[Any]) -> set[str]:
        ids = await real_settle(self, results)
        while untold:
            events, ours = untold.pop()
            await self._database.run(lambda e=events, o=ours: real_record(e, o))  # type: ignore[misc]
        return ids

    with swapped(store, "_record", record), swapped(store.Store, "settle", settle):
        yield


@contextmanager
def changes_forget_their_request() -> Iterator[None]:
    """A change that is asked for twice is tried twice."""
    with reworded(store, ["_FIND_REQUEST"], "AND request_id = ?", "AND request_id = ? AND 1 = 0"), reworded(
        store, ["_INSERT_REQUEST"], "INSERT INTO", "INSERT OR REPLACE INTO"
    ):  # fmt: skip
        yield


# --- The worker ---


@contextmanager
def lost_wakeup() -> Iterator[None]:
    """A batch that ends does not start the next one, and nobody else does."""

    def done(self: worker.Worker, task: Any) -> None:
        self._under_way.discard(task)

    async def linger(self: worker.Worker) -> None:
        return

    with swapped(worker.Worker, "_done", done), swapped(worker.Worker, "_linger", linger):
        yield


@contextmanager
def recovers_only_at_start() -> Iterator[None]:
    """Looks for work that nobody holds when it starts, and never again."""

    async def claim(self: worker.Worker) -> None:
        self.offer(await self._safely("claim", self._leases.claim(self._held_max)) or [])

    with swapped(worker.Worker, "_claim_forever", claim):
        yield


@contextmanager
def draining_goes_on_claiming() -> Iterator[None]:
    """Gives back what it has not begun, and then claims it again."""

    async def drain(self: worker.Worker) -> None:
        self._draining = True
        rest = list(self._held)
        self._held.keep(())
        if rest:
            await self._safely("release", self._leases.release(rest))
        await asyncio.gather(*self._under_way, return_exceptions=True)

    with swapped(worker.Worker, "drain", drain):
        yield


@contextmanager
def drains_without_giving_back() -> Iterator[None]:
    """Leaves with leases in its pocket."""

    async def release(self: store.Store, claims: Sequence[Claim]) -> None:
        return

    with swapped(store.Store, "release", release):
        yield


@contextmanager
def owner_name_used_again() -> Iterator[None]:
    """A restarted process has its predecessor's name, and renews all that carries it."""

    async def renew(self: store.Store, claims: Sequence[Claim]) -> set[str]:
        def script() -> Script[set[str]]:
            sql = "UPDATE application SET lease_until = {now} + ? WHERE owner = ? AND state = 'PENDING' RETURNING id"
            return {row[0] for row in (yield Statement(sql, [(self._lease_s, self._owner)]))}

        return await self._database.run(script)

    async def renew_forever(self: worker.Worker) -> None:
        while True:
            await self._clock.sleep(self._lease_s / 3)
            await self._safely("renew", self._leases.renew([]))

    with (
        swapped(World, "owner", lambda self, name: name),
        swapped(store.Store, "renew", renew),
        swapped(worker.Worker, "_renew_forever", renew_forever),
    ):
        yield


# --- Evidence ---


@contextmanager
def declines_on_missing_evidence() -> Iterator[None]:
    """Takes *undetermined* for a no."""
    outcomes = {**pipeline.OUTCOMES, Pricing.OUTCOME_UNDETERMINED: pipeline.Decision.OUTCOME_DECLINED}

    def conclude(self: pipeline.Pipeline, case: pipeline.Case) -> pipeline.Result:
        assert case.pricing is not None
        assert case.profile is not None
        assert case.score is not None
        return self._decided(case, case.profile, case.score, case.pricing)

    with swapped(pipeline, "OUTCOMES", outcomes), swapped(pipeline.Pipeline, "_conclude", conclude):
        yield


@contextmanager
def declines_on_stale_evidence() -> Iterator[None]:
    """Takes an old answer for a fresh one."""

    def fresh_until(observed_at: float, source: Any) -> float:
        return observed_at + source.usable_for_s

    def report(source: Any, answer: Any, now_s: float) -> SourceReport:
        made = real(source, answer, now_s)
        made.state = SourceReport.STATE_FRESH if made.state == SourceReport.STATE_STALE else made.state
        return made

    real = profile.report
    with swapped(gather, "is_fresh", freshness.is_usable), swapped(gather, "report", report), swapped(
        pipeline.Pipeline, "_gaps", lambda *_: ()
    ):  # fmt: skip
        yield


# --- Breaker, retry, deadline, watch ---


@contextmanager
def half_open_without_permits() -> Iterator[None]:
    """Half-open lets everybody through."""

    def refuses(self: breaker.Breaker) -> bool:
        return self.state is breaker.State.OPEN and self._clock.monotonic() < self._open_until

    with swapped(breaker.Breaker, "refuses", property(refuses)):
        yield


@contextmanager
def open_for_no_time() -> Iterator[None]:
    """Opens, and probes again at once."""

    def refuses(self: breaker.Breaker) -> bool:
        return self.state is breaker.State.HALF_OPEN and self._permits == 0

    with swapped(breaker.Breaker, "refuses", property(refuses)):
        yield


@contextmanager
def permit_not_returned() -> Iterator[None]:
    """A probe that ends without a verdict keeps its permit."""
    with swapped(breaker.Permit, "release", lambda self: None):
        yield


@contextmanager
def retry_at_two_layers() -> Iterator[None]:
    """Repeats calls that the channel repeats already."""
    real = mesh._ask

    async def ask(guard: Any, count: int, call: Callable[[], Any]) -> Any:
        async def again() -> Any:
            for _ in range(2):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return await call()
            return await call()

        return await real(guard, count, again)

    with swapped(mesh, "_ask", ask):
        yield


@contextmanager
def calls_without_deadline() -> Iterator[None]:
    """Waits for a service as long as it takes."""
    with swapped(replica, "deadline_s", lambda method: 3600.0):
        yield


@contextmanager
def deadline_not_passed_on() -> Iterator[None]:
    """Makes calls that outlive the one they are made for."""
    with swapped(deadline, "remaining_s", lambda now, at_most_s: at_most_s):
        yield


@contextmanager
def watcher_misses_changes() -> Iterator[None]:
    """Hears of what its own replica does, and of nothing else."""
    with swapped(watching.Watch, "start", lambda self: None):
        yield


Plant = Callable[[], contextlib.AbstractContextManager[None]]
MUTANTS: Mapping[str, Plant] = {
    plant.__name__: plant
    for plant in (
        acknowledge_before_commit, no_fence, no_fence_and_no_revision, no_once, request_stored_twice,
        lease_by_local_clock, claims_what_is_held, renews_a_lost_lease, defers_without_a_wait, priority_inversion,
        decision_and_event_apart, changes_forget_their_request, lost_wakeup, recovers_only_at_start,
        draining_goes_on_claiming, drains_without_giving_back, owner_name_used_again,
        declines_on_missing_evidence, declines_on_stale_evidence, half_open_without_permits, open_for_no_time,
        permit_not_returned, retry_at_two_layers, calls_without_deadline, deadline_not_passed_on,
        watcher_misses_changes,
    )
}  # fmt: skip
"""Each by its name; what is wrong stands in its docstring."""


@dataclass(frozen=True)
class Found:
    """When a mutant was found, and by what; seed None: never."""

    name: str
    seed: int | None
    seeds: int
    rules: tuple[str, ...]


def hunt(name: str, seeds: int = SEEDS, start: int = 0) -> Found:
    """Try seeds until one breaks a rule. Raises DoesNotFit where the bug cannot be planted."""
    with MUTANTS[name]():
        for seed in range(start, start + seeds):
            if violations := simulate(seed).violations:
                return Found(name, seed, seed - start + 1, tuple(by_rule(violations)))
    return Found(name, None, seeds, ())


def main() -> int:
    """Hunt them all; 1 where one survives, or has no place in the code any more."""
    parser = argparse.ArgumentParser(prog="python -m lab.simulator.mutants", description="Find planted bugs.")
    parser.add_argument("names", nargs="*", choices=[[], *MUTANTS], metavar="NAME", help="which; default: all")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many seeds each may survive")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    said = parser.parse_args()
    found = []
    for name in said.names or MUTANTS:
        result = hunt(name, said.seeds)
        found.append(result)
        fate = f"seed {result.seed}, after {result.seeds}: {', '.join(result.rules)}"
        print(f"{result.name:<34} {fate if result.rules else 'SURVIVED'}", file=sys.stderr if said.json else sys.stdout)
    killed = sum(result.seed is not None for result in found)
    rows: list[dict[str, object]] = [
        {"name": "planted bugs found", "value": killed, "unit": "bugs", "target": len(found),
         "met": killed == len(found)},
        *({"name": result.name, "value": result.seeds if result.rules else None, "unit": "seeds until found",
           "target": said.seeds, "met": bool(result.rules), "seed": result.seed, "rules": list(result.rules)}
          for result in found),
    ]  # fmt: skip
    Path("build").mkdir(exist_ok=True)
    Path("build/mutants.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if said.json:
        print(json.dumps(rows, indent=1))
    return 0 if killed == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
