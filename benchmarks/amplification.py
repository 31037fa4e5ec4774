"""How much more is asked of a part that fails every time: retries that multiply are what keeps a broken part broken.

Behind each hop in turn stands a service that answers UNAVAILABLE to everything and counts. Amplification of a hop is
all calls over first calls: gRPC marks its own retries. The client's hop is counted in calls over applications, and a
source's in queries over applications.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.request import urlopen

import grpc

from benchmarks import ours
from benchmarks.bench import Bench, Found, Row, at_most, figure, table
from benchmarks.generator import Played, traffic
from benchmarks.naive.mesh import plain_mesh
from benchmarks.promotion import set_fault
from lab.population import SOURCES
from loanmesh.cli.mesh import Mesh

RATE = 50
CLIENTS = 2
"""25 calls a second each. A client of few calls may repeat half a one a second, however few they are: at 50 clients
that alone would be half of the calls here, and would say nothing of a load that matters."""
LIMIT = 1.1
RETRY_MARK = "grpc-previous-rpc-attempts"
"""Header that gRPC adds to its own retries."""


class Failing(grpc.GenericRpcHandler):
    """Answers UNAVAILABLE to every call of ours; `first` and `again` count calls by method."""

    def __init__(self) -> None:
        self.first: Counter[str] = Counter()
        self.again: Counter[str] = Counter()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Counts, whatever it is."""
        if not handler_call_details.method.startswith("/lending."):
            return None  # Health is unimplemented, which gRPC reads as healthy.
        method = handler_call_details.method.rsplit("/", 1)[1]
        marks = [key for key, _ in handler_call_details.invocation_metadata or ()]
        (self.again if RETRY_MARK in marks else self.first)[method] += 1
        return grpc.unary_unary_rpc_method_handler(_fail)


async def _fail(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "always")
    raise AssertionError("abort raises")


@asynccontextmanager
async def failing() -> AsyncIterator[tuple[Failing, str]]:
    """Such a service in this process, and its address."""
    handler = Failing()
    server = grpc.aio.server(handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield handler, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def measure(bench: Bench) -> Found:
    """Hop by hop, ours and the plain mesh."""
    found: dict[str, tuple[float, str]] = {}
    async with failing() as (handler, address):
        played = await _send(bench, address)
        calls = handler.first["SubmitApplication"] + handler.again["SubmitApplication"]
        found["client -> intake"] = _ratio(calls, len(played.records), "applications")
    for service, method in (
        ("bureau", "GatherProfiles"), ("scoring", "ScoreProfiles"), ("pricing", "PriceApplications"),
    ):  # fmt: skip
        async with (
            failing() as (handler, address),
            ours.our_mesh(bench, **{f"INTAKE_{service.upper()}": address}) as mesh,
        ):
            await _send(bench, mesh.parts["intake"].address)
        calls = handler.first[method] + handler.again[method]
        found[f"intake -> {service}"] = _ratio(calls, handler.first[method], "first calls")
        bench.say(f"amplification: {service} done")
    async with ours.our_mesh(bench) as mesh:
        await set_fault(mesh, "*", error_rate=1.0)
        played = await _send(bench, mesh.parts["intake"].address)
        stats = await _stats(mesh)
    asked = sum(stats.get(f"{source}:error", 0) for source in SOURCES) / len(SOURCES)
    found["bureau -> a source"] = _ratio(asked, len(played.records), "applications")
    plain: dict[str, tuple[float, str]] = {}
    async with failing() as (handler, address), plain_mesh(bench, INTAKE_SCORING=address) as (front, _):
        played = await _send(bench, front, module="benchmarks.naive.traffic")
        plain["intake -> scoring, the plain mesh"] = _ratio(
            handler.first["ScoreProfiles"], len(played.records), "applications"
        )
    rows = [at_most(f"amplification {hop}", value, "ratio", LIMIT) for hop, (value, _) in found.items()]
    rows += [Row(f"amplification {hop}", value, "ratio") for hop, (value, _) in plain.items()]
    shown = [(hop, figure(value), said) for hop, (value, said) in (found | plain).items()]
    return Found(rows, [table(("hop", "amplification", "counted"), shown)], {hop: v for hop, (v, _) in found.items()})


async def _send(bench: Bench, address: str, module: str = "lab.traffic") -> Played:
    """Applications of subjects the mesh has not seen, at a rate that is no load."""
    seconds = bench.size(10, 2)
    return await traffic(
        bench, address, module=module, rate=RATE, clients=CLIENTS, seconds=seconds, subjects=2 * RATE * seconds
    )


def _ratio(calls: float, of: int, what: str) -> tuple[float, str]:
    assert of, "nothing was sent"
    assert calls, "nothing arrived: this hop was not measured"
    return calls / of, f"{calls:,.0f} calls, {of:,} {what}"


async def _stats(mesh: Mesh) -> dict[str, int]:
    def get() -> dict[str, int]:
        with urlopen(f"http://{mesh.parts['sandbox'].address}/control/stats", timeout=10) as answer:
            read: dict[str, int] = json.loads(answer.read())
            return read

    return await asyncio.to_thread(get)
