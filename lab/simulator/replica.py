"""The services of the mesh put together for the simulator, as their `main.py` do for processes. The one such place."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from lending.bureau.v1.bureau_service_pb2_grpc import add_BureauServiceServicer_to_server
from lending.intake.v1.intake_service_pb2_grpc import add_IntakeServiceServicer_to_server
from lending.intake.v1.parking_service_pb2_grpc import add_ParkingServiceServicer_to_server
from lending.pricing.v1.pricing_service_pb2_grpc import add_PricingServiceServicer_to_server
from lending.scoring.v1.scoring_service_pb2_grpc import add_ScoringServiceServicer_to_server
from lending.type.v1.party_pb2 import Party

from lab.simulator.callers import POISON
from lab.simulator.database import DatabaseServer
from lab.simulator.loop import EPOCH_S, NodeClock, VirtualLoop
from lab.simulator.network import Channel, Network, Observer, Retry, Server, asked_for
from lab.simulator.sources import SimWire, Sources
from loanmesh.runtime.breaker import Breaker, BreakerSettings, Change, State
from loanmesh.runtime.channel import SERVICE_CONFIG, _interceptors
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.guard import BulkheadSettings, Guard
from loanmesh.runtime.keys import KeyRing, Keys, new_ring
from loanmesh.runtime.sealed import Sealer
from loanmesh.runtime.server import ServerInterceptor
from loanmesh.runtime.witness import WitnessedClock
from services.bureau.brownout import Brownout
from services.bureau.gather import Gatherer
from services.bureau.servicer import BureauServicer
from services.bureau.settings import BrownoutSettings
from services.bureau.sources import Source, load_sources
from services.bureau.store import AnswerStore
from services.intake.admission import Admission
from services.intake.application import Claim
from services.intake.arrival import Arrivals
from services.intake.dictionary import labels
from services.intake.estimate import Estimate
from services.intake.explain import Label
from services.intake.main import batches_allowed
from services.intake.mesh import GrpcBureau, GrpcPricing, GrpcScoring, deadline_s
from services.intake.parking import Parking
from services.intake.parking_servicer import ParkingServicer
from services.intake.pipeline import Pipeline
from services.intake.ports import Case, Deferred, Result
from services.intake.privacy import Privacy
from services.intake.quota import Quota
from services.intake.replay import Replay
from services.intake.servicer import IntakeServicer
from services.intake.settings import ParkingSettings
from services.intake.store import Store
from services.intake.watch import Watch
from services.intake.worker import Worker
from services.pricing.policy import Policy, load_policy
from services.pricing.servicer import PricingServicer
from services.pricing.settings import PricingSettings
from services.scoring.model import Model, load_model
from services.scoring.servicer import ScoringServicer
from services.scoring.settings import ScoringSettings

RETRY = Retry.of(SERVICE_CONFIG)
SERVICE_BREAKER = BreakerSettings(
    window=10, minimum_calls=4, failure_rate=0.7, slow_call_s=1.8, half_open_permits=2, open_s_max=3.0
)
PARKING = ParkingSettings(attempts_max=3, wait_s_first=0.5, wait_s_max=5.0)
SOURCE_BREAKER = BreakerSettings(window=10, minimum_calls=4, half_open_permits=2, open_s=0.5, open_s_max=3.0)


@dataclass(frozen=True)
class Sizes:
    """Settings of the simulated services: shorter and smaller than real ones, so that every bound is met in a run."""

    lease_s: float = 2.5
    poll_s: float = 0.5
    watch_poll_s: float = 1.0
    batch_max: int = 4
    batches: int = 2
    held_max: int = 8
    queue_s_max: float = 2.0
    leave_s: float = 0.2
    drain_s: float = 3.0
    budget_s: float = 1.0
    source_timeout_s: float = 2.5
    at_once_max: int = 8
    parking: ParkingSettings = PARKING
    service_breaker: BreakerSettings = SERVICE_BREAKER
    breaker: BreakerSettings = SOURCE_BREAKER


@dataclass
class Surroundings:
    """What a process is started into."""

    loop: VirtualLoop
    dice: random.Random
    network: Network
    observer: Observer
    sizes: Sizes
    sources: Sources
    databases: Mapping[str, DatabaseServer]
    owners: Callable[[str], str]
    ids: Callable[[NodeClock], str]
    mended: set[str] = field(default_factory=set)
    """Applications on which our bug is mended: they trip it no more."""


class Process(ABC):
    """One process of one service: started, perhaps drained, perhaps killed; never started again."""

    service: str

    def __init__(self, name: str, around: Surroundings) -> None:
        self.name = name
        self.around = around
        self.node = around.loop.add_node(name)
        self.clock = NodeClock(around.loop, self.node)
        self.owner = around.owners(name)
        self.server: Server | None = None
        self.stopping = False
        self.gone: Callable[[], None] = lambda: None
        """Called when it has ended of its own accord."""

    def start(self) -> None:
        """Begin to come up."""
        self.around.loop.spawn(self.node, self._boot())

    def terminate(self) -> None:
        """As SIGTERM."""
        if self.node.alive and not self.stopping:
            self.stopping = True
            self.around.loop.spawn(self.node, self._stop())

    def kill(self) -> None:
        """As SIGKILL."""
        self.around.loop.kill(self.node)

    async def _boot(self) -> None:
        await self.clock.sleep(self.around.dice.uniform(0.01, 0.1))
        server = Server(self.around.network, self.node, self.service, ServerInterceptor(self.clock))
        self.server = server
        await self.serve(server)
        server.announce(True)

    async def _stop(self) -> None:
        """The order of loanmesh.runtime.server."""
        if self.server:
            self.server.announce(False)
            await self.clock.sleep(self.around.sizes.leave_s)
            await self.drain()
            await self.server.stop(self.around.sizes.drain_s)
            await self.close()
            self.gone()
            self.node.left = True
        self.kill()

    @abstractmethod
    async def serve(self, server: Server) -> None:
        """Put the service together behind the server."""

    async def drain(self) -> None:  # noqa: B027  Most have nothing to drain.
        """Take nothing new, finish what is begun."""

    async def close(self) -> None:  # noqa: B027  Most have nothing to close.
        """Close what was opened."""


class Poison(Exception):
    """A bug of ours that one application trips; it takes the whole batch with it."""


class Asking:
    """Stands before a port of the pipeline and counts the attempts that each question of it costs."""

    def __init__(
        self, ask: Callable[[Sequence[Case]], Any], what: str, observer: Observer, mended: Collection[str]
    ) -> None:
        self._ask = ask
        self._what = what
        self._observer = observer
        self._mended = mended

    async def __call__(self, cases: Sequence[Case]) -> Any:
        if self._what == "bureau" and any(self._is_poison(case) for case in cases):
            raise Poison
        attempts = [0]
        asked_for.set(attempts)
        try:
            return await self._ask(cases)
        finally:
            if attempts[0] > RETRY.attempts_max:
                text = f"one question to {self._what} was sent {attempts[0]} times"
                self._observer.violate("retries_have_one_layer", "", text)

    def _is_poison(self, case: Case) -> bool:
        return case.application.channel == POISON and case.claim.id not in self._mended


class _Port:
    """Bureau, scoring and pricing as the pipeline knows them, counted."""

    def __init__(self, bureau: GrpcBureau, scoring: GrpcScoring, pricing: GrpcPricing, around: Surroundings) -> None:
        self.gather = Asking(bureau.gather, "bureau", around.observer, around.mended)
        self.score = Asking(scoring.score, "scoring", around.observer, around.mended)
        self.price = Asking(pricing.price, "pricing", around.observer, around.mended)


RETRY = Retry.of(SERVICE_CONFIG)


class Held(Worker):
    """The real worker, whose memory is looked at."""

    observer: Observer
    limit: int

    def offer(self, claims: Sequence[Claim]) -> None:
        """Take applications, and say so when they are too many."""
        super().offer(claims)
        if self.waiting + len(self._working) > self.limit:
            text = f"{self.waiting} wait and {len(self._working)} are under way in one replica"
            self.observer.violate("memory_is_bounded", "", text)


class Intake(Process):
    """services.intake.main.build, with the simulator's edges."""

    service = "intake"
    trouble = False
    """Whether something went wrong that mends itself, since when it holds what it need not."""

    async def serve(self, server: Server) -> None:
        """Put intake together and start its worker."""
        around, sizes = self.around, self.around.sizes
        self.database = around.databases["intake"].connect(self.node, self.owner)
        clock = WitnessedClock(self.clock, lambda: store.now(), lambda _: None)
        store = Store(self.database, clock, self.owner, sizes.lease_s, Privacy(sealer(clock)))
        channels = [
            Channel(around.network, self.node, service, RETRY, _interceptors(clock, deadline_s))
            for service in ("bureau", "scoring", "pricing")
        ]
        guards = [
            Guard(name, "service", Breaker(sizes.service_breaker, clock, around.dice), BulkheadSettings(), clock)
            for name in ("bureau", "scoring", "pricing")
        ]
        bureau, scoring, pricing = (
            GrpcBureau(channels[0], guards[0]),  # type: ignore[arg-type]  # Channels of the simulator, by design.
            GrpcScoring(channels[1], guards[1]),  # type: ignore[arg-type]
            GrpcPricing(channels[2], guards[2]),  # type: ignore[arg-type]
        )
        self.watch = Watch(store.revisions, clock, sizes.watch_poll_s, self._report)
        self.estimate = Estimate(store.backlog, clock)
        port = _Port(bureau, scoring, pricing, around)
        arrivals = Arrivals()
        admission = Admission(sizes.queue_s_max, arrivals, Quota(0, 1), clock)
        parking = Parking(sizes.parking, clock, around.dice)
        pipeline = Pipeline(
            port, port, port, store, clock, around.dice, 14, parking, self._report, tuple(known_sources())
        )
        self.worker = Held(
            store,
            pipeline.decide_batch,
            clock,
            batch_max=sizes.batch_max,
            batches=sizes.batches,
            held_max=sizes.held_max,
            lease_s=sizes.lease_s,
            poll_s=sizes.poll_s,
            settled=self._settled,
            report=self._report,
            pressed=lambda: arrivals.pressed(clock.monotonic()),
            crowded=admission.crowded,
            may_begin=lambda: batches_allowed(guards),
        )
        # Beside what may be held: a claim under way, and what is being accepted.
        self.worker.observer, self.worker.limit = around.observer, 3 * sizes.held_max
        self.servicer = IntakeServicer(
            store,
            self.worker,
            self.watch,
            self.estimate,
            pricing.schedules,
            Replay(scoring, pricing),
            known_labels(),
            clock,
            lambda: around.ids(self.clock),
            accepts_waiting_max=64,
            admission=admission,
            is_sure=lambda: clock.is_sure,
        )
        add_IntakeServiceServicer_to_server(self.servicer, server.as_grpc)
        add_ParkingServiceServicer_to_server(ParkingServicer(store, self.watch.changed), server.as_grpc)
        self.worker.start()
        self.watch.start()
        self.looking = asyncio.create_task(clock.look_forever())

    async def drain(self) -> None:
        """As the service does on SIGTERM."""
        await self.worker.drain()
        self.watch.leave()

    async def close(self) -> None:
        """As the service does at its end."""
        self.looking.cancel()
        await self.watch.stop()
        await self.database.close()

    def _settled(self, results: Mapping[str, Result]) -> None:
        self.estimate.decided(sum(not isinstance(r, Deferred) for r in results.values()), self.worker.busy)
        self.watch.settled(results)

    def _report(self, event: str, **facts: Any) -> None:
        self.around.observer.trace(f"{self.name} reports {event} {facts.get('count', '')}")
        if event == "application_parked":
            return
        self.trouble = True
        if isinstance(facts.get("exc_info"), Poison):
            return
        # What mends itself is a database that is away; anything else is a bug that a loop survived.
        if facts.get("exc_info") or facts.get("error_type", "DependencyDown") != "DependencyDown":
            text = f"{self.name} reports {event} {facts.get('exc_info')!r}"
            self.around.observer.violate("nothing_is_unexpected", "", text)


class Bureau(Process):
    """services.bureau.main.build, with the simulator's edges."""

    service = "bureau"

    async def serve(self, server: Server) -> None:
        """Put bureau together."""
        self._opened_at: dict[str, float] = {}
        around, sizes, clock = self.around, self.around.sizes, self.clock
        sources = known_sources()
        wire = SimWire(around.sources, clock, sizes.source_timeout_s, around.loop, around.dice, around.observer)
        wire.permits = sizes.breaker.half_open_permits
        bulkhead = BulkheadSettings(at_once_max=sizes.at_once_max, waiting_max=64)
        guards = {}
        for name in sources:
            breaker = Breaker(sizes.breaker, clock, around.dice, functools.partial(self._tell, name))
            guards[name] = Guard(name, "source", breaker, bulkhead, clock)
            wire.breakers[name] = breaker
        self.cache = AnswerStore(around.databases["bureau"].connect(self.node, self.owner), clock, sealer(clock))
        self.gatherer = Gatherer(
            sources,
            wire,
            self.cache,
            clock,
            hashed,
            guards=guards,
            budget_s=sizes.budget_s,
            retry_s=1.0,
            brownouts={n: Brownout(guard, BrownoutSettings(), sizes.budget_s, clock) for n, guard in guards.items()},
        )
        add_BureauServiceServicer_to_server(BureauServicer(self.gatherer, self.cache.erase), server.as_grpc)

    async def close(self) -> None:
        """As the service does at its end."""
        await self.gatherer.close()
        await self.cache.close()

    def _tell(self, source: str, change: Change) -> None:
        shortest_s = self.around.sizes.breaker.open_s * (1 - self.around.sizes.breaker.jitter)
        if change.state is State.OPEN:
            self._opened_at[source] = self.around.loop.now_s
        elif change.state is State.HALF_OPEN and self.around.loop.now_s - self._opened_at[source] < shortest_s:
            self.around.observer.violate("breakers_hold", "", f"that of {source} was open for too short a time")
        self.around.observer.trace(f"{self.name} breaker of {source} is {change.state.value}: {change.cause}")


class Scoring(Process):
    """The real scoring service; it is pure but for the time it notes."""

    service = "scoring"

    async def serve(self, server: Server) -> None:
        """With the models that are shipped."""
        add_ScoringServiceServicer_to_server(ScoringServicer(models(), self.clock), server.as_grpc)


class Pricing(Process):
    """The real pricing service; it is pure but for the time it notes."""

    service = "pricing"

    async def serve(self, server: Server) -> None:
        """With the policy that is shipped."""
        add_PricingServiceServicer_to_server(PricingServicer(policy(), self.clock), server.as_grpc)


SERVICES: Mapping[str, type[Process]] = {"intake": Intake, "bureau": Bureau, "scoring": Scoring, "pricing": Pricing}


def hashed(_: str, number: str) -> str:
    """The cache's key of a subject. The real one is keyed; nothing here is secret."""
    return f"h{number}"


def sealer(clock: Clock) -> Sealer:
    """What the real services seal with, under keys that are the same in each run and no secret."""
    return Sealer(Keys(_ring(), clock))


@lru_cache(maxsize=1)
def _ring() -> KeyRing:
    return new_ring(dt.datetime.fromtimestamp(EPOCH_S - 86400, dt.UTC), bytes)


@lru_cache(maxsize=1)
def known_labels() -> dict[str, Label]:
    """Read once, not once a run."""
    return labels()


@lru_cache(maxsize=1)
def known_sources() -> dict[str, Source]:
    """Read once, not once a run."""
    return load_sources()


@lru_cache(maxsize=1)
def models() -> Mapping[Party.Kind.ValueType, Model]:
    """Read once, not once a run."""
    settings = ScoringSettings()
    return {Party.KIND_PERSON: load_model(settings.consumer_model), Party.KIND_FIRM: load_model(settings.firm_model)}


@lru_cache(maxsize=1)
def policy() -> Policy:
    """Read once, not once a run."""
    return load_policy(PricingSettings().policy)
