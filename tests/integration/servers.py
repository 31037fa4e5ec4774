"""Real servers in the test's own process, which do what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lending.scoring.v1 import scoring_service_pb2 as pb
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceServicer
from lending.scoring.v1.scoring_service_pb2_grpc import add_ScoringServiceServicer_to_server as add_scoring

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import ServerSettings, TlsSettings

CLOCK = SystemClock()
PLAIN = TlsSettings(mode="plaintext")
Behaviour = Callable[[grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]


class Scoring(ScoringServiceServicer):
    """A scoring service that does what it is told, and counts."""

    def __init__(self) -> None:
        self.calls = 0
        self.peers: set[str] = set()
        self.left_s: list[float] = []
        self.does: Behaviour | None = None
        self.answers_max = 256
        self.mixes_up = False
        """Whether it answers in another order than it was asked in."""
        self.asked = pb.ScoreProfilesRequest()

    async def ScoreProfiles(
        self, request: pb.ScoreProfilesRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ScoreProfilesResponse:
        self.calls += 1
        self.asked = request
        self.peers.add(context.peer())
        self.left_s.append(context.time_remaining())
        if self.does:
            await self.does(context)
        scored = [
            pb.ScoreProfilesResponse.Result(key=item.key, score=pb.Score(pd=0.1, grade="C"))
            for item in request.items[: self.answers_max]
        ]
        return pb.ScoreProfilesResponse(results=reversed(scored) if self.mixes_up else scored)


class Server:
    """A real server on a free port, with health, as every service has it."""

    def __init__(self, settings: ServerSettings | None = None) -> None:
        self.scoring = Scoring()  # type: ignore[abstract]  # ListModels is left unimplemented.
        self.health = health.aio.HealthServicer()
        self.server = make_server(settings or ServerSettings(), CLOCK)
        add_scoring(self.scoring, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    async def serve(self) -> None:
        await self.server.start()
        await self.set_health(serving=True)

    async def set_health(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.health.set("", status)


@asynccontextmanager
async def servers(count: int, settings: ServerSettings | None = None) -> AsyncIterator[list[Server]]:
    async with AsyncExitStack() as stack:
        started = [Server(settings) for _ in range(count)]
        for one in started:
            await one.serve()
            stack.push_async_callback(one.server.stop, 0)
        yield started


async def code(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def failing(status: grpc.StatusCode) -> Behaviour:
    async def fail(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(status, "as told")

    return fail


async def hang(context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await asyncio.Event().wait()
