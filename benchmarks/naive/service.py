"""One service of the plain mesh.

    python -m benchmarks.naive.service bureau|scoring|pricing|intake

The work is ours to the line (gather, score, price: the same modules), and so are the settings. What is plain is
everything around it: no interceptors, no batches (one RPC an application and hop), no deadline on inner calls, no
limit on what is under way, and no store: a decision lives in the handler until it is answered. Its address is printed.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import uvloop
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.clock import Clock, SystemClock, new_uuid7
from loanmesh.runtime.guard import BulkheadSettings, Guard, make_guard
from loanmesh.runtime.server import Service
from loanmesh.runtime.settings import load
from services.bureau.main import build as build_bureau
from services.bureau.settings import BureauSettings
from services.intake.application import Claim, inputs_of
from services.intake.dictionary import sources
from services.intake.mesh import GrpcBureau, GrpcPricing, GrpcScoring
from services.intake.parking import Parking
from services.intake.pipeline import Pipeline
from services.intake.ports import Decided, Result
from services.intake.settings import IntakeSettings, ParkingSettings
from services.pricing.main import build as build_pricing
from services.pricing.settings import PricingSettings
from services.scoring.main import build as build_scoring
from services.scoring.settings import ScoringSettings


class _InHand:
    """Where decisions are kept: nowhere. The pipeline's store for as long as one handler runs."""

    def __init__(self) -> None:
        self.result: Result | None = None

    async def settle(self, results: Sequence[Result]) -> set[str]:
        (self.result,) = results
        return {self.result.claim.id}


class PlainIntake:
    """Decides while the caller waits."""

    def __init__(self, bureau: GrpcBureau, scoring: GrpcScoring, pricing: GrpcPricing, clock: Clock) -> None:
        self._parts = bureau, scoring, pricing
        self._clock = clock
        self._parking = Parking(ParkingSettings(), clock, random.Random())
        self._sources = sources()

    async def submit_application(
        self, request: pb.SubmitApplicationRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.SubmitApplicationResponse:
        """Decided, or UNAVAILABLE."""
        in_hand = _InHand()
        pipeline = Pipeline(
            *self._parts, in_hand, self._clock, random.Random(), 14, self._parking, lambda *_, **__: None, self._sources
        )
        payload = inputs_of(request.application).SerializeToString(deterministic=True)
        created_at = self._clock.now().timestamp()
        claim = Claim(new_uuid7(self._clock), request.parent, 1, 1, 1, 1, "", payload, "[]", created_at)
        await pipeline.decide_batch([claim])
        if not isinstance(in_hand.result, Decided):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no decision")
            raise AssertionError("abort raises")
        answer = pb.SubmitApplicationResponse()
        answer.application.name = f"{request.parent}/applications/{claim.id}"
        answer.application.state = pb.Application.STATE_DECIDED
        answer.application.decision.ParseFromString(in_hand.result.decision)
        return answer


def _open(name: str, clock: Clock) -> Guard:
    """A guard that lets everything pass, for ports that want one: never enough calls to judge, room for all."""
    breaker = BreakerSettings(window=10**9, minimum_calls=10**9, window_s=0.001)
    return make_guard(name, "service", breaker, BulkheadSettings(at_once_max=10**9), clock, random.Random())


async def build_intake(settings: IntakeSettings, clock: Clock) -> Service:
    """The front, with a plain channel to each of the others."""
    channels = [grpc.aio.insecure_channel(at) for at in (settings.bureau, settings.scoring, settings.pricing)]
    bureau, scoring, pricing = channels
    servicer = PlainIntake(
        GrpcBureau(bureau, _open("bureau", clock)),
        GrpcScoring(scoring, _open("scoring", clock)),
        GrpcPricing(pricing, _open("pricing", clock)),
        clock,
    )

    async def close() -> None:
        await asyncio.gather(*(channel.close() for channel in channels))

    return Service([(_add, servicer)], [], close=close)


def _add(servicer: PlainIntake, server: grpc.aio.Server) -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        servicer.submit_application,
        pb.SubmitApplicationRequest.FromString,
        pb.SubmitApplicationResponse.SerializeToString,
    )
    name = "lending.intake.v1.IntakeService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"SubmitApplication": handler}),))


PARTS: dict[str, Callable[[Clock], Awaitable[Service]]] = {
    "bureau": lambda clock: build_bureau(load(BureauSettings), clock),
    "scoring": lambda clock: build_scoring(load(ScoringSettings), clock),
    "pricing": lambda clock: build_pricing(load(PricingSettings), clock),
    "intake": lambda clock: build_intake(load(IntakeSettings), clock),
}


async def serve(name: str) -> None:
    """Serve until SIGTERM."""
    service = await PARTS[name](SystemClock())
    server = grpc.aio.server()
    for add, servicer in service.registrations:
        add(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(1)
    if service.close:
        await service.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))
