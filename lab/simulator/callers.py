"""Who uses the mesh: shops that submit, watch, accept and withdraw through the real client, and note all they see."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import grpc
from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from lending.intake.v1.parking_service_pb2 import ReleaseApplicationsRequest
from lending.intake.v1.parking_service_pb2_grpc import ParkingServiceStub
from lending.type.v1.party_pb2 import Consent

from lab.history import FINAL, PARKED, Recorder
from lab.population import Kind
from lab.simulator.loop import EPOCH, Node, NodeClock, VirtualLoop
from lab.simulator.network import Channel, Network, Observer
from lab.simulator.sources import PEOPLE, population
from loanmesh.client import CallFailed, Client, Refused, Unreachable
from loanmesh.client.security import Bearer
from loanmesh.client.together import CROWD
from loanmesh.client.transport import GrpcTransport

LENDER = "lenders/demo"
POISON = "poison"
"""Channel of applications that trip a bug."""


class SimTransport(GrpcTransport):
    """The client's own transport over the simulator's network: only the channel is another."""

    def __init__(self, network: Network, node: Node) -> None:
        channel: Any = Channel(network, node, "intake")
        self._use(channel, Bearer(None), None)


@dataclass(frozen=True)
class Plan:
    """What will be done with one application."""

    number: int
    at: float
    kind: Kind
    subject: int
    priority: pb.Priority.ValueType
    wait_s: float
    twice: bool
    """Submitted by two hands at the same moment, as after a double click."""
    without_consent: str
    """A source whose consent is forgotten at first; '' for none."""
    follow: str
    """`watch`, or `poll`."""
    then: str
    """`accept`, `withdraw`, `ask` for an explanation with schedules, or '' for nothing."""
    poison: bool = False
    """Trips a bug of ours in the pipeline, whenever it is looked at, until it is parked and the bug is mended."""
    released: bool = False
    """Whether the bug is mended within the run, and the application released."""

    @property
    def request_id(self) -> str:
        """The idempotency key."""
        return f"request-{self.number:04d}"


@lru_cache(maxsize=200)
def application_bytes(kind: Kind, subject: int) -> bytes:
    """What a subject sends, serialised."""
    return json_format.ParseDict(population().application(kind, subject, EPOCH), pb.Application()).SerializeToString()


def draw_plans(dice: random.Random, count: int, over_s: float) -> list[Plan]:
    """What a run's callers will do; most of it ordinary."""
    poisoned = dice.randrange(count) if dice.random() < 0.06 else None
    return [
        Plan(
            number,
            dice.uniform(0.2, over_s),
            "person" if dice.random() < 0.7 else "firm",
            dice.randrange(PEOPLE),
            dice.choice([pb.PRIORITY_INTERACTIVE, pb.PRIORITY_INTERACTIVE, pb.PRIORITY_PARTNER, pb.PRIORITY_BULK]),
            dice.choice([0.0, 0.0, 1.0, 3.0]),
            dice.random() < 0.15,
            dice.choice(["tax", "court", "central_bank"]) if dice.random() < 0.12 else "",
            dice.choice(["watch", "poll"]),
            dice.choice(["accept", "accept", "withdraw", "ask", ""]),
            number == poisoned,
            number == poisoned and dice.random() < 0.5,
        )
        for number in range(count)
    ]


def draw_rush(dice: random.Random) -> list[Plan]:
    """More than can be decided at once, of no urgency, and then a few that somebody waits for."""
    patient = [pb.PRIORITY_BULK] * 36
    urgent = [pb.PRIORITY_INTERACTIVE] * 4
    return [
        Plan(number, dice.uniform(0.2, 1.0) if priority == pb.PRIORITY_BULK else dice.uniform(1.5, 3.0), "person",
             dice.randrange(PEOPLE), priority, 0.0, False, "", "poll", "")
        for number, priority in enumerate(patient + urgent)
    ]  # fmt: skip


def at_once(plans: Sequence[Plan]) -> list[Plan]:
    """The same, submitted at one moment and of one kind."""
    return [replace(plan, at=plans[0].at, priority=plans[0].priority, wait_s=plans[0].wait_s) for plan in plans]


class Shop:
    """One client process with several applications on its hands."""

    def __init__(
        self, name: str, loop: VirtualLoop, network: Network, dice: random.Random, recorder: Recorder,
        observer: Observer, patience_s: float = 8.0, share_from: int = CROWD,
    ) -> None:  # fmt: skip
        self.name = name
        self._loop = loop
        self._dice = dice
        self._recorder = recorder
        self._observer = observer
        self._node = loop.add_node(name)
        self._clock = NodeClock(loop, self._node)
        transport = SimTransport(network, self._node)
        self._client = Client(
            "", client_id=name, patience_s=patience_s, clock=self._clock, dice=dice, transport=transport,
            share_from=share_from,
        )  # fmt: skip
        self._stub = IntakeServiceStub(transport._channel)
        self._parking = ParkingServiceStub(transport._channel)

    def open(self, plans: Sequence[Plan], together: bool = False) -> asyncio.Task[Any]:
        """Begin; done when all of the plans are.

        together  submit all in one go, when the first is due.
        """
        return self._loop.spawn(self._node, self._together(plans) if together else self._all(plans))

    async def _all(self, plans: Sequence[Plan]) -> None:
        await asyncio.gather(*(self._one(plan) for plan in plans))

    async def _one(self, plan: Plan) -> None:
        await self._clock.sleep(plan.at)
        application = _application(plan)
        hands = [self._submit(plan, application, f"{self._reader(plan)}{hand}") for hand in ("", "+")[: 1 + plan.twice]]
        answers = await asyncio.gather(*hands)
        await self._follow(plan, answers[0].name)

    async def _together(self, plans: Sequence[Plan]) -> None:
        await self._clock.sleep(min((plan.at for plan in plans), default=0.0))
        left = {plan.request_id: plan for plan in plans}
        names: dict[str, str] = {}
        for plan in plans:
            self._recorder.submitted(self.name, plan.request_id)
        while left:
            items = [(key, _application(plan)) for key, plan in left.items()]
            try:
                async for result in self._client.submit_many(items):
                    if isinstance(result, Refused):
                        self._observer.violate("nothing_sound_is_refused", "", f"of many: {result.error}")
                        return
                    assert result.application is not None
                    plan = left.pop(result.request_id)
                    names[result.request_id] = result.name
                    self._recorder.acknowledged(self.name, result.request_id, result.application, self._reader(plan))
            except Unreachable:
                await self._clock.sleep(self._dice.uniform(0.2, 1.0))
        await asyncio.gather(*(self._follow(plan, names[plan.request_id]) for plan in plans))

    def _reader(self, plan: Plan) -> str:
        return f"{self.name}/{plan.number}"

    async def _follow(self, plan: Plan, name: str) -> None:
        self._observer.trace(f"{self.name} follows {plan.request_id} = {name[-12:]}")
        if plan.poison and not (await self._parked(plan, name) and plan.released):
            return
        decided = await self._decided(plan, name, self._reader(plan))
        if decided.state == pb.Application.STATE_DECIDED:
            await self._react(plan, decided, self._reader(plan))

    async def _submit(self, plan: Plan, application: pb.Application, reader: str) -> pb.Application:
        self._recorder.submitted(self.name, plan.request_id)
        answer: pb.Application = await self._patiently(
            lambda: self._client.submit(application, request_id=plan.request_id, wait_s=plan.wait_s)
        )
        self._recorder.acknowledged(self.name, plan.request_id, answer, reader)
        return answer

    async def _decided(self, plan: Plan, name: str, reader: str) -> pb.Application:
        """Follow it until it is final, supplying what is asked for."""
        supplied = 0
        while True:
            seen = await (self._watched(name, reader) if plan.follow == "watch" else self._polled(name, reader))
            if seen.state != pb.Application.STATE_AWAITING_INFORMATION:
                return seen
            supplied += 1
            request = pb.SupplyInformationRequest(name=name, request_id=f"supply-{plan.number:04d}-{supplied}")
            for missing in seen.missing_information:
                consent = request.consents.add(source=missing.source, purpose=Consent.PURPOSE_CREDIT_ASSESSMENT)
                consent.given_time.FromDatetime(EPOCH)
            self._recorder.read(reader, await self._patiently(functools.partial(self._client.supply, request)))

    async def _parked(self, plan: Plan, name: str) -> bool:
        """Whether it was parked; then, where the plan says so, as an SRE sees it: mended, and set going again."""
        while PARKED not in (seen := await self._patiently(lambda: self._client.get(name))).waiting_for:
            self._recorder.read(self._reader(plan), seen)
            if seen.state != pb.Application.STATE_PENDING:
                return False
            await self._clock.sleep(self._dice.uniform(0.5, 3.0))
        self._recorder.read(self._reader(plan), seen)
        if plan.released:
            self._observer.mend(name.rsplit("/", 1)[1])
            request = ReleaseApplicationsRequest(
                names=[name], request_id=f"release-{plan.number:04d}", actor="sre", reason="mended"
            )
            while True:
                try:
                    answer = await self._parking.ReleaseApplications(request, timeout=2.0)
                except grpc.aio.AioRpcError:
                    await self._clock.sleep(self._dice.uniform(0.2, 1.0))
                    continue
                for result in answer.results:
                    if result.HasField("error"):
                        self._observer.violate("nothing_sound_is_refused", name, f"release: {result.error.message}")
                break
        return True

    async def _watched(self, name: str, reader: str) -> pb.Application:
        # A watch may be cut: then it starts again, and may show again what it has shown.
        while True:
            try:
                async for seen in self._client.watch(name):
                    self._recorder.read(reader, seen)
                    if _settled(seen):
                        return seen
            except Unreachable:
                continue

    async def _polled(self, name: str, reader: str) -> pb.Application:
        while True:
            seen: pb.Application = await self._patiently(lambda: self._client.get(name))
            self._recorder.read(reader, seen)
            if _settled(seen):
                return seen
            await self._clock.sleep(self._dice.uniform(0.5, 3.0))

    async def _react(self, plan: Plan, decided: pb.Application, reader: str) -> None:
        name = decided.name
        key = f"then-{plan.number:04d}"
        if plan.then == "ask":
            # Asked once and only so long, by somebody who does not use our client.
            request = pb.ExplainDecisionRequest(name=name, include_schedules=True)
            with contextlib.suppress(grpc.aio.AioRpcError):
                explained = await self._stub.ExplainDecision(request, timeout=self._dice.uniform(0.1, 0.9))
                self._recorder.explained(name, explained)
        elif plan.then == "withdraw":
            answer = await self._patiently(lambda: self._client.withdraw(name, request_id=key))
            self._recorder.read(reader, answer)
        elif plan.then == "accept" and decided.decision.offers:
            offer = self._dice.choice([offer.offer_id for offer in decided.decision.offers])
            self._recorder.accept_asked(self.name, name, offer)
            answer = await self._patiently(lambda: self._client.accept(name, offer, request_id=key))
            self._recorder.accepted(self.name, offer, answer, reader)

    async def _patiently(self, call: Any) -> Any:
        """A person tries again for as long as it takes; a sound request must never be refused."""
        while True:
            try:
                return await call()
            except Unreachable:
                await self._clock.sleep(self._dice.uniform(0.2, 1.0))
            except CallFailed as error:
                self._observer.violate("nothing_sound_is_refused", "", f"{error.code}: {error}")
                raise


def _application(plan: Plan) -> pb.Application:
    application = pb.Application.FromString(application_bytes(plan.kind, plan.subject))
    application.priority = plan.priority
    if plan.poison:
        application.channel = POISON
    if plan.without_consent:
        kept = [c for c in application.consents if c.source != plan.without_consent]
        del application.consents[:]
        application.consents.extend(kept)
    return application


def _settled(application: pb.Application) -> bool:
    state = pb.Application.State.Name(application.state).removeprefix("STATE_")
    return state in FINAL or state == "AWAITING_INFORMATION"
