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
from lending.intake.v1.intake_service_pb2 import Decision
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing

from lab.judge import by_rule
from lab.simulator import database, replica
from lab.simulator.world import World, simulate
from loanmesh.client import calls, together
from loanmesh.client.transport import SUBMIT
from loanmesh.runtime import breaker, deadline, witness
from loanmesh.runtime.database import Script, Statement
from loanmesh.runtime.errors import DependencyDown, LoanmeshError, NotFound
from services.intake import mesh, parking, pipeline, worker
from services.intake import watch as watching
from services.intake.application import Claim, New, Snapshot, State, Stored
from services.intake.ports import Broken, Case, Result, Unavailable
from services.intake.store import Store, accepting, changing, leasing, settling
from services.pricing import decide
from services.pricing.evidence import evidence as evidence_of

SEEDS = 3000
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
    real_accept, real_get = Store.accept, Store.get

    async def accept(self: Store, batch: Sequence[tuple[New, bool]]) -> list[Stored]:
        remembered = self.__dict__.setdefault("_remembered", {})

        async def later() -> None:
            with contextlib.suppress(DependencyDown):
                await real_accept(self, [(new, False) for new, _ in batch])

        asyncio.get_running_loop().create_task(later())
        remembered.update({new.id: new for new, _ in batch})
        return [Stored(new.id, new.payload_hash, False) for new, _ in batch]

    async def get(self: Store, lender: str, application_id: str) -> Snapshot:
        try:
            return await real_get(self, lender, application_id)
        except NotFound:
            new: New | None = self.__dict__.get("_remembered", {}).get(application_id)
            if new is None:
                raise
            return Snapshot(
                new.id, lender, new.payload, State.PENDING, 0.0, (), (), None, 1, "", 1, new.created_at,
                new.created_at, None, new.priority,
            )  # fmt: skip

    with swapped(Store, "accept", accept), swapped(Store, "get", get):
        yield


@contextmanager
def no_fence() -> Iterator[None]:
    """Commits without asking whether the lease is still its own; revision and state still guard."""
    with reworded(settling, ["_DECIDE", "_AWAIT", "_DEFER"], "AND fence = ?", "AND ? IS NOT NULL"):
        yield


@contextmanager
def no_fence_and_no_revision() -> Iterator[None]:
    """Commits whenever the application is pending, whatever happened meanwhile: the chain of events forks."""
    with (
        no_fence(),
        reworded(settling, ["_DECIDE", "_AWAIT", "_DEFER"], "AND revision = ?", "AND ? IS NOT NULL"),
    ):
        yield


@contextmanager
def no_once() -> Iterator[None]:
    """Neither fence nor state nor primary key make the decision the only one."""
    with (
        no_fence_and_no_revision(),
        reworded(settling, ["_DECIDE"], "AND state = 'PENDING'", ""),
        without_key("CREATE TABLE decision", "PRIMARY KEY (application_id, assessment)"),
        without_key("CREATE TABLE event", "PRIMARY KEY (application_id, seq)"),
    ):
        yield


@contextmanager
def request_stored_twice() -> Iterator[None]:
    """Does not look whether a request_id was stored before."""
    conflict = "ON CONFLICT (lender, client_id, request_id) DO NOTHING"
    key = "CONSTRAINT application_request UNIQUE (lender, client_id, request_id)"
    with reworded(accepting, ["_INSERT"], conflict, ""), without_key("CREATE TABLE application", key):
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
    with reworded(leasing, ["_CLAIM_URGENT", "_CLAIM_OLDEST"], "lease_until < {now}", "lease_until < {now} + 2"):
        yield


@contextmanager
def renews_a_lost_lease() -> Iterator[None]:
    """Renews whatever it once held, also what another replica has taken over."""
    with reworded(leasing, ["_RENEW"], "AND fence = ? AND owner = ?", "AND ? IS NOT NULL AND ? IS NOT NULL"):
        yield


@contextmanager
def defers_without_a_wait() -> Iterator[None]:
    """What cannot be decided now is looked at again at once, and again."""
    with reworded(settling, ["_DEFER"], "ELSE {now} + ? END", "ELSE {now} + 0 * ? END"):
        yield


@contextmanager
def priority_inversion() -> Iterator[None]:
    """Claims what is least urgent first."""
    with reworded(leasing, ["_CLAIM_URGENT"], "ORDER BY priority,", "ORDER BY priority DESC,"):
        yield


@contextmanager
def decision_and_event_apart() -> Iterator[None]:
    """Commits the decision in one transaction and tells of it in another."""
    real_record, real_settle = settling._record, Store.settle
    untold: list[tuple[Any, set[str]]] = []

    def record(events: Any, ours: set[str]) -> Script[None]:
        untold.append((events, ours))
        yield Statement("SELECT 1 WHERE ? = 0", [(1,)])

    async def settle(self: Store, results: Sequence[Any]) -> set[str]:
        ids = await real_settle(self, results)
        while untold:
            events, ours = untold.pop()
            await self._clock.sleep(0.1)  # There is other work, too.
            await self._database.run(lambda e=events, o=ours: real_record(e, o))  # type: ignore[misc]
        return ids

    with swapped(settling, "_record", record), swapped(Store, "settle", settle):
        yield


@contextmanager
def changes_forget_their_request() -> Iterator[None]:
    """A change that is asked for twice is tried twice."""
    with reworded(changing, ["_FIND_REQUEST"], "AND request_id = ?", "AND request_id = ? AND 1 = 0"), reworded(
        changing, ["_INSERT_REQUEST"], "INSERT INTO", "INSERT OR REPLACE INTO"
    ):  # fmt: skip
        yield


@contextmanager
def changes_acknowledged_before_commit() -> Iterator[None]:
    """Says that an offer is accepted, and writes it down in a second's time, with others."""
    real = Store.change

    async def change(self: Store, *args: Any) -> None:
        async def later() -> None:
            await self._clock.sleep(1.0)
            with contextlib.suppress(LoanmeshError):
                await real(self, *args)

        asyncio.get_running_loop().create_task(later())

    with swapped(Store, "change", change):
        yield


@contextmanager
def reads_from_a_cache() -> Iterator[None]:
    """Each replica remembers what it read for a few seconds."""
    real = Store.get

    async def get(self: Store, lender: str, application_id: str) -> Snapshot:
        known: dict[str, tuple[float, Snapshot]] = self.__dict__.setdefault("_known", {})
        read_at, snapshot = known.get(application_id, (float("-inf"), None))
        if snapshot is None or self._clock.monotonic() > read_at + 3:
            snapshot = await real(self, lender, application_id)
            known[application_id] = (self._clock.monotonic(), snapshot)
        return snapshot

    with swapped(Store, "get", get):
        yield


# --- The worker ---


@contextmanager
def one_bug_spoils_the_batch() -> Iterator[None]:
    """What fails together is tried again together, for ever."""
    real = pipeline.Pipeline._decide

    async def decide_batch(self: pipeline.Pipeline, claims: Sequence[Claim]) -> Mapping[str, Result]:
        return await real(self, claims, pipeline._Way())

    with swapped(pipeline.Pipeline, "decide_batch", decide_batch):
        yield


@contextmanager
def poison_never_parked() -> Iterator[None]:
    """What breaks a stage at each attempt is tried again, for ever."""
    real = parking.Parking.broke

    def broke(self: parking.Parking, application_id: str, stage: str, faults: int) -> parking.Blame:
        blame = real(self, application_id, stage, faults)
        return parking.Blame.UNKNOWN if blame is parking.Blame.APPLICATION else blame

    with swapped(parking.Parking, "broke", broke):
        yield


@contextmanager
def parked_is_claimed() -> Iterator[None]:
    """What is parked is claimed as anything else that is open."""
    with reworded(leasing, ["_CLAIM_URGENT", "_CLAIM_OLDEST"], "state = 'PENDING'", "state IN ('PENDING', 'PARKED')"):
        yield


@contextmanager
def believes_its_own_clock() -> Iterator[None]:
    """Judges consents by its own time of day, however wrong that is."""
    with swapped(witness.WitnessedClock, "now", lambda self: self._own.now()):
        yield


@contextmanager
def parks_whom_a_dead_source_holds_up() -> Iterator[None]:
    """Takes whatever cannot be decided now for broken."""

    def without(self: pipeline.Pipeline, case: Case, gap: Unavailable) -> Result:
        return self._set_apart(case.claim, "gather", Broken(gap.cause, "Unavailable"))

    with swapped(pipeline.Pipeline, "_without", without):
        yield


@contextmanager
def replays_under_todays_clock() -> Iterator[None]:
    """A replay prices the stored evidence as of now."""
    real = mesh.GrpcPricing.price

    async def price(self: mesh.GrpcPricing, cases: Sequence[Case]) -> Any:
        for case in cases:
            case.as_of = None
        return await real(self, cases)

    with swapped(mesh.GrpcPricing, "price", price):
        yield


@contextmanager
def holds_whatever_comes() -> Iterator[None]:
    """Holds in memory all that it is sent."""
    with swapped(worker.Worker, "has_room", lambda self, priority, more=0: True):
        yield


@contextmanager
def tells_what_was_not_committed() -> Iterator[None]:
    """Answers who waits with what it found, whether or not it was still its to say."""

    class Blind:
        """A store that says that all was committed."""

        def __init__(self, real: Any) -> None:
            self._real = real

        async def settle(self, results: Sequence[Any]) -> set[str]:
            with contextlib.suppress(DependencyDown):
                await self._real.settle(results)
            return {result.claim.id for result in results}

    real = pipeline.Pipeline.__init__

    def init(self: pipeline.Pipeline, *args: Any, **more: Any) -> None:
        real(self, *args, **more)
        self._store = Blind(self._store)

    with swapped(pipeline.Pipeline, "__init__", init):
        yield


@contextmanager
def mixed_up_in_a_shared_call() -> Iterator[None]:
    """Says of the submits that shared a call what became of others."""
    real = together.Together._ask

    async def ask(self: together.Together, group: Any) -> Any:
        reply = await real(self, group)
        results = reply.response.results
        asked = [result.request_id for result in results]
        results.reverse()
        for result, request_id in zip(results, asked, strict=True):
            result.request_id = request_id
        return reply

    with swapped(together.Together, "_ask", ask):
        yield


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

    async def release(self: Store, claims: Sequence[Claim]) -> None:
        return

    with swapped(Store, "release", release):
        yield


@contextmanager
def owner_name_used_again() -> Iterator[None]:
    """A restarted process has its predecessor's name, and renews all that carries it."""

    async def renew(self: Store, claims: Sequence[Claim]) -> set[str]:
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
        swapped(Store, "renew", renew),
        swapped(worker.Worker, "_renew_forever", renew_forever),
    ):
        yield


# --- Evidence ---


@contextmanager
def declines_on_missing_evidence() -> Iterator[None]:
    """Takes *undetermined* for a no."""
    outcomes = {**pipeline.OUTCOMES, Pricing.OUTCOME_UNDETERMINED: Decision.OUTCOME_DECLINED}

    def conclude(self: pipeline.Pipeline, case: Case) -> Result:
        assert case.pricing is not None
        assert case.profile is not None
        assert case.score is not None
        return self._decided(case, case.profile, case.score, case.pricing)

    with swapped(pipeline, "OUTCOMES", outcomes), swapped(pipeline.Pipeline, "_conclude", conclude):
        yield


@contextmanager
def declines_on_stale_evidence() -> Iterator[None]:
    """Pricing takes an old answer for a fresh one, and intake does not look again."""
    real = evidence_of

    def evidence(item: PriceApplicationsRequest.Item, *args: Any) -> Any:
        blind = PriceApplicationsRequest.Item()
        blind.CopyFrom(item)
        for report in blind.profile.reports:
            report.ClearField("usable_until_time")
            if report.state == SourceReport.STATE_STALE:
                report.state = SourceReport.STATE_FRESH
        return real(blind, *args)

    with swapped(decide, "evidence", evidence), swapped(pipeline.Pipeline, "_gaps", lambda *_: ()):
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

    async def ask(guard: Any, cases: Any, call: Callable[[Any], Any]) -> Any:
        async def again(some: Any) -> Any:
            for _ in range(2):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    return await call(some)
            return await call(some)

        return await real(guard, cases, again)

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
def a_new_request_id_for_each_attempt() -> Iterator[None]:
    """The client repeats a submit as if it were another one."""
    real = calls.Calls._attempt

    async def attempt(self: calls.Calls, call: Any, method: Any, request: Any, *args: Any) -> Any:
        if method is SUBMIT:
            request.request_id = f"{request.request_id[:12]}-{call.attempts:04d}"
        return await real(self, call, method, request, *args)

    with swapped(calls.Calls, "_attempt", attempt):
        yield


@contextmanager
def watcher_misses_changes() -> Iterator[None]:
    """Hears of what its own replica does, and of nothing else."""
    with swapped(watching.Watch, "start", lambda self: None):
        yield


Plant = Callable[[], contextlib.AbstractContextManager[None]]
LATE = ("decided_in_time", "callers_are_answered")
MUTANTS: Mapping[str, tuple[Plant, Sequence[str]]] = {
    plant.__name__: (plant, rules)
    for plant, rules in (
        (acknowledge_before_commit, ["nothing_is_lost"]),
        (changes_acknowledged_before_commit, ["acceptances_add_up"]),
        (no_fence, ["fences_hold"]),
        (no_fence_and_no_revision, ["fences_hold", "events_hold"]),
        (no_once, ["decided_once"]),
        (request_stored_twice, ["requests_keep_their_name"]),
        (lease_by_local_clock, ["leases_are_respected"]),
        (claims_what_is_held, ["leases_are_respected"]),
        (renews_a_lost_lease, ["leases_are_respected"]),
        (defers_without_a_wait, ["nobody_runs_in_circles"]),
        (priority_inversion, ["urgent_goes_first"]),
        (decision_and_event_apart, ["events_hold"]),
        (changes_forget_their_request, ["nothing_sound_is_refused"]),
        (reads_from_a_cache, ["readers_go_forward"]),
        (lost_wakeup, LATE),
        (recovers_only_at_start, LATE),
        (draining_goes_on_claiming, ["who_drains_gives_back"]),
        (drains_without_giving_back, ["who_drains_gives_back"]),
        (owner_name_used_again, LATE),
        (one_bug_spoils_the_batch, LATE),
        (poison_never_parked, LATE),
        (parked_is_claimed, ["parked_rests"]),
        (parks_whom_a_dead_source_holds_up, ["only_poison_is_parked"]),
        (believes_its_own_clock, ["nothing_sound_is_refused"]),
        (replays_under_todays_clock, ["decisions_replay"]),
        (holds_whatever_comes, ["memory_is_bounded"]),
        (tells_what_was_not_committed, ["readers_agree"]),
        (declines_on_missing_evidence, ["declines_rest_on_evidence"]),
        (declines_on_stale_evidence, ["declines_rest_on_evidence"]),
        (half_open_without_permits, ["breakers_hold"]),
        (open_for_no_time, ["breakers_hold"]),
        (permit_not_returned, LATE),
        (retry_at_two_layers, ["retries_have_one_layer"]),
        (calls_without_deadline, ["deadlines_are_kept"]),
        (deadline_not_passed_on, ["deadlines_are_kept"]),
        (a_new_request_id_for_each_attempt, ["nothing_is_stored_twice"]),
        (mixed_up_in_a_shared_call, ["requests_keep_their_name"]),
        (watcher_misses_changes, ["callers_are_answered"]),
    )
}
"""Each by its name, with the rules of which one has to find it: what is found by another is another bug, not this one.
What is wrong stands in its docstring."""


@dataclass(frozen=True)
class Found:
    """When a mutant was found, and by what; seed None: never."""

    name: str
    seed: int | None
    seeds: int
    rules: tuple[str, ...]


def hunt(name: str, seeds: int = SEEDS, start: int = 0) -> Found:
    """Try seeds until one breaks a rule that is meant to. Raises DoesNotFit where the bug cannot be planted."""
    plant, rules = MUTANTS[name]
    with plant():
        for seed in range(start, start + seeds):
            broken = by_rule(simulate(seed).violations)
            if any(rule in broken for rule in rules):
                return Found(name, seed, seed - start + 1, tuple(broken))
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
