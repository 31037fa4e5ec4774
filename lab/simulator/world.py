"""One run: a seed draws a mesh, its callers and its misfortunes; the run is lived through, and judged."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import io
import random
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from lending.intake.v1 import intake_service_pb2 as pb

from lab import history, judge
from lab.history import PARKED, Acknowledged, Decided, Record, Recorder, Submitted
from lab.judge import Violation
from lab.population import SOURCES
from lab.simulator.callers import LENDER, POISON, Plan, Shop, at_once, draw_plans, draw_rush
from lab.simulator.database import INTAKE_GUARDS, DatabaseServer, blank
from lab.simulator.faults import AT_PLACES, Fault, draw_faults, draw_rush_faults
from lab.simulator.loop import EPOCH_S, NodeClock, Stuck, VirtualLoop
from lab.simulator.network import Network, Weather
from lab.simulator.replica import SERVICES, Intake, Process, Sizes, Surroundings, hashed, known_sources
from lab.simulator.sources import PEOPLE, Sources, facts_of, population
from loanmesh.client.together import CROWD
from loanmesh.runtime.errors import DependencyDown, NotFound
from services.bureau.profile import Answer
from services.bureau.tables import metadata as bureau_tables
from services.intake.tables import metadata as intake_tables

FAULTS_OVER_S = 12.0
"""Faults begin within this time; callers come within it, too."""
HEALED_AT_S = 20.0
"""By now everything that was broken is whole again, but who was frozen late, who goes on within a few seconds."""
RECOVERY_S = 120.0
"""Within this time after that everything must be decided: a lease, and the longest backoff (24 s) a few times, since a
breaker with few callers needs two probes and a slow source may miss one's budget."""

TOGETHER = 0.2
"""Share of runs in which one of the callers submits all it has with `submit_many`."""
RUSHES = 0.05
"""Share of runs in which nothing breaks, but more arrives at once than can be decided at once."""


@dataclass
class Outcome:
    """What came of a run."""

    seed: int
    records: list[Record]
    violations: list[Violation]
    applications: int
    faults: int
    virtual_s: float
    handles: int
    trace: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The history as it is written down; the same for the same seed, byte for byte."""
        sink = io.StringIO()
        history.write(self.records, sink)
        return sink.getvalue()


class World:
    """Everything there is in one run. Also the one who is told of what must never happen."""

    def __init__(self, seed: int, sizes: Sizes | None = None, *, tracing: bool = False) -> None:
        self.seed = seed
        self.dice = random.Random(seed)
        self.sizes = sizes or Sizes()
        self.loop = VirtualLoop(self.dice)
        self.violations: list[Violation] = []
        self.lines: list[str] = []
        self._tracing = tracing
        self.network = Network(self.loop, self.dice, self)
        self.sources = Sources()
        self.sources.latency_s = self.dice.choice([0.005, 0.02, 0.3, 0.8])
        inline = self.dice.random() < 0.5
        self.databases = {
            "intake": DatabaseServer(
                "intake", blank(intake_tables, INTAKE_GUARDS), self.loop, self.dice, self, inline=inline
            ),
            "bureau": DatabaseServer("bureau", blank(bureau_tables, ""), self.loop, self.dice, self, inline=inline),
        }
        self.databases["intake"].latency_s = self.dice.choice([0.001, 0.001, 0.02])
        self.recorder = Recorder(lambda: round(EPOCH_S + self.loop.now_s, 6))
        self.processes: dict[str, Process] = {}
        self._stored_at: dict[str, float] = {}
        self._leased_at_once: set[str] = set()
        self._claimed_at: dict[str, list[float]] = {}
        self._starts = 0
        self.around = Surroundings(
            self.loop, self.dice, self.network, self, self.sizes, self.sources, self.databases, self.owner, self.new_id
        )  # fmt: skip
        replicas = {"intake": self.dice.choice([1, 2, 2, 3]), "bureau": self.dice.choice([1, 1, 2]), "scoring": 1,
                    "pricing": 1}  # fmt: skip
        self.places = [f"{service}-{n}" for service, count in replicas.items() for n in range(1, count + 1)]
        self.rush = self.dice.random() < RUSHES
        if self.rush:
            self.places = ["intake-1", "bureau-1", "scoring-1", "pricing-1"]
            self.sources.latency_s = 0.3
        self.plans = (
            draw_rush(self.dice) if self.rush else draw_plans(self.dice, self.dice.randint(2, 9), FAULTS_OVER_S)
        )
        self.faults = [
            fault
            for fault in (draw_rush_faults(self.dice) if self.rush else draw_faults(self.dice, FAULTS_OVER_S))
            if fault.whom in self.places or fault.what not in AT_PLACES
        ]

    # --- Told by everybody ---

    def violate(self, rule: str, application: str, text: str) -> None:
        """Something happened that must not, whether or not anybody outside ever sees it."""
        self.violations.append(Violation(rule, application, f"at {self.loop.now_s:.4f}: {text}", ()))
        self.trace(f"VIOLATION {rule} {application} {text}")

    def trace(self, text: str) -> None:
        """A line of the run's log, where it is kept."""
        if self._tracing:
            self.lines.append(f"{self.loop.now_s:9.4f}  {text}")

    def stored(self, application_id: str, is_free: int) -> None:
        """An application is in the store from now on; free for whoever claims it, or leased to who accepted it."""
        self._stored_at[application_id] = self.loop.now_s
        if not is_free:
            self._leased_at_once.add(application_id)

    def looked_at(self, application_id: str, attempts: int) -> None:
        """An application was claimed from the store: seldom enough?"""
        self._claimed_at.setdefault(application_id, []).append(self.loop.now_s)
        age_s = self.loop.now_s - self._stored_at[application_id]
        # Waits double from half a second, a takeover needs a lease to end, and what was supplied is looked at at once.
        limit = 8 + 0.4 * age_s
        # A source that is too busy is asked on, by each replica at its own pace, which may be down to one a second.
        limit += sum(3 * min(age_s, fault.lasts_s) for fault in self.faults if fault.mood == "overloaded")
        if attempts > limit:
            text = f"looked at {attempts} times within {age_s:.1f} s"
            self.violate("nobody_runs_in_circles", application_id, text)

    def mend(self, application_id: str) -> None:
        """A release mends the bug of ours that the application trips."""
        self.trace(f"MENDED for {application_id}")
        self.around.mended.add(application_id)

    def owner(self, name: str) -> str:
        """A name that no process, earlier or later, has."""
        self._starts += 1
        return f"{name}-{self._starts}"

    def new_id(self, clock: NodeClock) -> str:
        """A UUIDv7 with drawn bits."""
        value = (int(clock.now().timestamp() * 1000) << 80) | (7 << 76) | self.dice.getrandbits(76)
        text = f"{value & ~(3 << 62) | (2 << 62):032x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"

    # --- Processes ---

    def start(self, place: str) -> Process:
        """Start a process in its place; whoever was there is gone or goes."""
        process = SERVICES[place.split("-")[0]](place, self.around)
        self.processes[place] = process
        if isinstance(process, Intake):
            process.gone = functools.partial(self._left_behind, process)
        process.start()
        return process

    def _left_behind(self, process: Intake) -> None:
        """Who left in good order has given back what it held."""
        # A store that is slower than the drain hands over leases when nobody can give them back; those end by time.
        if process.trouble or any(fault.what == "slow_database" for fault in self.faults):
            return
        for (application_id,) in self.databases["intake"].ask(
            f"SELECT id FROM application WHERE owner = '{process.owner}' AND state = 'PENDING'"
        ):
            self.violate("who_drains_gives_back", application_id, f"{process.owner} left in good order and holds it")

    async def _suffer(self, fault: Fault) -> None:
        """Let one fault happen, and end it."""
        clock = NodeClock(self.loop, self.loop.world)
        await clock.sleep(fault.at)
        self.trace(f"FAULT {fault}")
        ends = asyncio.Event()
        self.loop.call_later(min(fault.lasts_s, HEALED_AT_S - 2 - self.loop.now_s), ends.set)
        weather = self.network.weather
        match fault.what:
            case "kill":
                process = self.processes[fault.whom]
                if process.node.alive:
                    if fault.how:
                        process.node.die_after(int(fault.how))
                    else:
                        process.kill()
                await ends.wait()
                process.kill()
                if self.processes[fault.whom] is process:
                    self.start(fault.whom)
            case "pause":
                node = self.processes[fault.whom].node
                node.freeze_after(int(fault.how))
                while not node.paused and not ends.is_set():
                    await clock.sleep(0.02)
                node.freeze_after(None)
                if node.paused:
                    await clock.sleep(fault.lasts_s)
                node.paused = False
            case "roll":
                old = self.processes[fault.whom]
                old.terminate()
                # The twin comes up while the old one still drains, or after it has gone.
                await clock.sleep(self.dice.choice([0.0, 0.1, 0.3, fault.lasts_s]))
                if self.processes[fault.whom] is old:
                    self.start(fault.whom)
            case "loss":
                weather.loss = fault.how
                await ends.wait()
                weather.loss = 0.0
            case "duplicates":
                weather.duplicates = fault.how
                await ends.wait()
                weather.duplicates = 0.0
            case "slow_network":
                weather.latency_s = fault.how
                await ends.wait()
                weather.latency_s = Weather().latency_s
            case "cut":
                pair = ("intake", fault.whom)
                weather.cut.add(pair)
                await ends.wait()
                weather.cut.discard(pair)
            case "database":
                self.databases[fault.whom].stop()
                await ends.wait()
                self.databases[fault.whom].start()
            case "slow_database":
                database, before_s = self.databases[fault.whom], self.databases[fault.whom].latency_s
                database.latency_s = max(before_s, fault.how)
                await ends.wait()
                database.latency_s = 0.001
            case "source":
                self.sources.moods[fault.whom] = fault.mood  # type: ignore[assignment]  # Drawn from the moods.
                await ends.wait()
                self.sources.moods[fault.whom] = "well"
            case "clock":
                node = self.processes[fault.whom].node
                node.skew_s += fault.how
                await ends.wait()
                node.skew_s -= fault.how
        self.trace(f"over: {fault}")

    # --- The run ---

    def run(self) -> Outcome:
        """Live through it and judge it."""
        task = None
        with _quiet(self), _no_collection():
            try:
                task = self.loop.spawn(self.loop.world, self._live())
                self.loop.run_until(task, HEALED_AT_S + RECOVERY_S + 30)
            except Stuck as stuck:
                self.violate("runs_come_to_an_end", "", str(stuck))
            for error in self.loop.failed_tasks():
                self.violate("nothing_is_unexpected", "", f"a task died of {error!r}")
            violations = [*self.violations, *self._judged()]
            outcome = Outcome(
                self.seed, self.recorder.records, violations, len(self.plans), len(self.faults), self.loop.now_s,
                self.loop.handles, self.lines,
            )  # fmt: skip
            self.loop.end()
            for database in self.databases.values():
                database.close()
        return outcome

    async def _live(self) -> None:
        clock = NodeClock(self.loop, self.loop.world)
        self._remember_old_evidence()
        for place in self.places:
            self.start(place)
        # The first shares calls as soon as it has two of a kind to send, and in every third run it has.
        shops = [
            Shop(f"shop-{n}", self.loop, self.network, self.dice, self.recorder, self, share_from=crowd)
            for n, crowd in ((1, 0), (2, CROWD))
        ]
        plans = [self.plans[0::2], self.plans[1::2]]
        if self.seed % 3 == 0:
            plans[0] = at_once(plans[0])
        together = self.dice.random() < TOGETHER
        visits = [shop.open(plans[n], together and n == 1) for n, shop in enumerate(shops)]
        suffering = [self.loop.spawn(self.loop.world, self._suffer(fault)) for fault in self.faults]
        while not all(task.done() for task in suffering):
            await clock.sleep(0.5)
        for place in self.places:
            if not self.processes[place].node.alive:
                self.start(place)
        self.trace("HEALED")
        healed_at = self.loop.now_s
        while not all(task.done() for task in visits) and self.loop.now_s < healed_at + RECOVERY_S:
            await clock.sleep(0.5)
        await clock.sleep(0.1)
        for task in visits:
            if not task.done():
                self.violate("callers_are_answered", "", f"a shop still waits {RECOVERY_S:g} s after all was whole")
        await self._audit()

    def _remember_old_evidence(self) -> None:
        """Bureau has asked before: some answers are fresh, some just about to run out, some stale, some far too old."""
        rows = []
        identities = [population().subject(kind, n).identity for kind in ("person", "firm") for n in range(PEOPLE)]
        wanted = {plan_identity(plan) for plan in self.plans}
        for identity in identities:
            if identity not in wanted:
                continue
            for source in known_sources().values():
                age = self.dice.choice([None, None, 0.2, 0.999, 3.0, 9.0])
                if age is None:
                    continue
                observed = EPOCH_S - source.fresh_for_s * age if age != 0.999 else EPOCH_S - source.fresh_for_s + self.dice.uniform(0, 15)  # noqa: E501  # fmt: skip
                registered, facts = facts_of()[identity]
                found = registered or source.id != "central_bank"
                answer = Answer(found, facts[source.id] if found else {}, observed, observed)
                rows.append((LENDER, hashed(LENDER, identity), source.id, answer.to_json(), observed))
        self.databases["bureau"].perform(
            lambda c: c.executemany(
                "INSERT INTO source_answer (lender, subject_hash, source, answer, fetched_at) VALUES (?, ?, ?, ?, ?)",
                rows,
            )
        )

    async def _audit(self) -> None:
        """Ask a replica about everything, with nothing in the way."""
        intake = next((p for p in self.processes.values() if isinstance(p, Intake) and p.node.alive), None)
        if intake is None or intake.server is None:
            self.violate("runs_come_to_an_end", "", "no intake is up at the end")
            return
        servicer: Any = intake.servicer
        names = dict.fromkeys(r.name for r in self.recorder.records if isinstance(r, Acknowledged))
        for name in names:
            with contextlib.suppress(NotFound):  # Then it stands nowhere, and the checker says so.
                await self._look_at(name, servicer)
        decided = next((r.name for r in self.recorder.records if isinstance(r, Decided)), None)
        if decided:
            await self._replay(decided, servicer)

    async def _replay(self, name: str, servicer: Any) -> None:
        """One decision of the run, made once more from what was stored with it."""
        clock = NodeClock(self.loop, self.loop.world)
        for _ in range(10):
            with contextlib.suppress(DependencyDown):  # A breaker may still be open from what went before.
                replayed = await servicer.ReplayDecision(pb.ReplayDecisionRequest(name=name), None)
                if not replayed.same:
                    self.violate("decisions_replay", name, f"differs in {', '.join(replayed.differences)}")
                return
            await clock.sleep(1.0)
        self.violate("decisions_replay", name, "cannot be replayed, though all is whole")

    async def _look_at(self, name: str, servicer: Any) -> None:
        shown = (await servicer.GetApplication(pb.GetApplicationRequest(name=name), None)).application
        told = await servicer.ListEvents(pb.ListEventsRequest(parent=name, page_size=1000), None)
        self.recorder.told(name, told.events, told.chain_intact)
        if shown.HasField("decision"):
            explained = await servicer.ExplainDecision(pb.ExplainDecisionRequest(name=name), None)
            self.recorder.explained(name, explained)
        is_parked = PARKED in shown.waiting_for
        if is_parked and shown.channel != POISON:
            self.violate("only_poison_is_parked", name, "parked, and nothing is wrong with it")
        if shown.state == pb.Application.STATE_PENDING and not is_parked:
            text = f"still pending {RECOVERY_S:g} s after all was whole, waiting for {', '.join(shown.waiting_for)}"
            self.violate("decided_in_time", name, text)
        self.recorder.standing(shown)

    def _judged(self) -> Iterator[Violation]:
        yield from judge.check(self.recorder.records, SOURCES)
        if self.rush and not self.faults:
            yield from self._overtaken()
        asked = {(r.client, r.request_id) for r in self.recorder.records if isinstance(r, Submitted)}
        seen: set[tuple[str, str]] = set()
        for application_id, client, request_id in self.databases["intake"].ask(
            "SELECT id, client_id, request_id FROM application ORDER BY id"
        ):
            if (client, request_id) in seen or (client, request_id) not in asked:
                text = f"stored beside another of request {request_id}, or asked for by nobody"
                yield Violation("nothing_is_stored_twice", application_id, text, ())
            seen.add((client, request_id))

    def _overtaken(self) -> Iterator[Violation]:
        """While somebody urgent lies in the store, few of no urgency are taken from it: one in five, by age."""
        rows = self.databases["intake"].ask("SELECT id, priority FROM application ORDER BY id")
        patient = [at for key, rank in rows if rank == pb.PRIORITY_BULK for at in self._claimed_at.get(key, ())]
        for application_id, rank in rows:
            if rank != pb.PRIORITY_INTERACTIVE or application_id in self._leased_at_once:
                continue
            stored_at, claimed_at = self._stored_at[application_id], self._claimed_at.get(application_id, [0.0])[0]
            overtook = sum(stored_at < at < claimed_at for at in patient)
            if overtook > self.sizes.held_max // 2:
                yield Violation("urgent_goes_first", application_id, f"{overtook} of no urgency were taken before", ())


def plan_identity(plan: Plan) -> str:
    """Whom the application is about."""
    return population().subject(plan.kind, plan.subject).identity


def simulate(seed: int, *, tracing: bool = False) -> Outcome:
    """One run."""
    return World(seed, tracing=tracing).run()


@contextlib.contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Logs go into the trace. An error in them is a violation: services log one only where they met a bug."""

    def capture(_: Any, level: str, event: MutableMapping[str, Any]) -> str:
        world.trace(f"log {level} {event}")
        if level == "error":
            world.violate("nothing_is_unexpected", "", f"logged {event}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[capture], cache_logger_on_first_use=False)
    try:
        yield
    finally:
        structlog.configure(**before)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What the garbage collector tidies up, and when, must not depend on what ran before."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
