"""How much more is asked of a part that fails every time: retries that multiply are what keeps a broken part broken.

Behind each hop in turn stands a relay that counts. First it passes everything on, then it answers UNAVAILABLE to the
same traffic: amplification is the calls of the second run over those of the first. How many of them were gRPC's own
retries, which it marks, is told beside. The client's hop and a source's are counted against applications.
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
from lending.intake.v1 import intake_service_pb2 as pb

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


class Relay(grpc.GenericRpcHandler):
    """Stands before a service of ours; counts calls by method, and passes them on or answers UNAVAILABLE.

    passes_to  address of the service; None: it fails every call.
    """

    def __init__(self) -> None:
        self.passes_to: str | None = None
        self.calls: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        """Those of them that gRPC marked as its own retries."""
        self.submitted = 0
        """Applications in them; those that came together count one by one."""
        self._channel: grpc.aio.Channel | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Counts, whatever it is."""
        name = handler_call_details.method
        if not name.startswith("/lending."):
            return None  # Health is unimplemented, which gRPC reads as healthy.
        method = name.rsplit("/", 1)[1]
        self.calls[method] += 1
        self.retries[method] += any(key == RETRY_MARK for key, _ in handler_call_details.invocation_metadata or ())

        async def answer(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            if method == "BatchSubmitApplications":
                self.submitted += len(pb.BatchSubmitApplicationsRequest.FromString(request).requests)
            self.submitted += method == "SubmitApplication"
            if self.passes_to is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "always")
            self._channel = self._channel or grpc.aio.insecure_channel(str(self.passes_to))
            ask: Any = self._channel.unary_unary(name)
            said: bytes = await ask(request, timeout=context.time_remaining())
            return said

        return grpc.unary_unary_rpc_method_handler(answer)

    async def close(self) -> None:
        """Let the service go."""
        if self._channel:
            await self._channel.close()


@asynccontextmanager
async def relay() -> AsyncIterator[tuple[Relay, str]]:
    """One in this process, failing, and its address."""
    handler = Relay()
    server = grpc.aio.server(handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield handler, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
        await handler.close()


async def measure(bench: Bench) -> Found:
    """Hop by hop, ours and the plain mesh."""
    found: dict[str, tuple[float, str]] = {}
    async with relay() as (counted, address):
        played = await _send(bench, address)
        found["client -> intake"] = _ratio(counted.submitted, len(played.records), "applications")
    for service, method in (
        ("bureau", "GatherProfiles"), ("scoring", "ScoreProfiles"), ("pricing", "PriceApplications"),
    ):  # fmt: skip
        well, ill, retries = await _hop(bench, service, method)
        value, said = _ratio(ill, well, f"calls when it is well; {retries:,} of them gRPC's own retries")
        found[f"intake -> {service}"] = value, said
        bench.say(f"amplification: {service} done")
    async with ours.our_mesh(bench) as mesh:
        await set_fault(mesh, "*", error_rate=1.0)
        played = await _send(bench, mesh.parts["intake"].address)
        stats = await _stats(mesh)
    asked = sum(stats.get(f"{source}:error", 0) for source in SOURCES) / len(SOURCES)
    found["bureau -> a source"] = _ratio(asked, len(played.records), "applications")
    plain: dict[str, tuple[float, str]] = {}
    async with relay() as (counted, address), plain_mesh(bench, INTAKE_SCORING=address) as (front, _):
        played = await _send(bench, front, module="benchmarks.naive.traffic")
        plain["intake -> scoring, the plain mesh"] = _ratio(
            counted.calls["ScoreProfiles"], len(played.records), "applications"
        )
    rows = [at_most(f"amplification {hop}", value, "ratio", LIMIT) for hop, (value, _) in found.items()]
    rows += [Row(f"amplification {hop}", value, "ratio") for hop, (value, _) in plain.items()]
    shown = [(hop, figure(value), said) for hop, (value, said) in (found | plain).items()]
    return Found(rows, [table(("hop", "amplification", "counted"), shown)], {hop: v for hop, (v, _) in found.items()})


async def _hop(bench: Bench, service: str, method: str) -> tuple[int, int, int]:
    """Calls of the method when the service is well, when it fails, and how many of the latter were gRPC's retries."""
    calls: list[Counter[str]] = []
    for is_well in (True, False):
        async with (
            relay() as (counted, address),
            ours.our_mesh(bench, **{f"INTAKE_{service.upper()}": address}) as mesh,
        ):
            counted.passes_to = mesh.parts[service].address if is_well else None
            await _send(bench, mesh.parts["intake"].address)
            calls.append(counted.calls.copy())
    return calls[0][method], calls[1][method], counted.retries[method]


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
