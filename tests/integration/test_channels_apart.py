"""Channels of one process share nothing: shared health watches have ended whole processes."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lab.proxy import Proxy
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import ServerSettings, TlsSettings

CLOCK = SystemClock()
PLAIN = TlsSettings(mode="plaintext")


async def test_each_channel_has_a_connection_of_its_own() -> None:
    server = make_server(ServerSettings(), CLOCK)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
    proxy = Proxy(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", CLOCK)
    await server.start()
    await proxy.start()
    channels = [open_channel(proxy.address, CLOCK, lambda _: 5.0, service="bureau", tls=PLAIN) for _ in range(3)]
    try:
        for channel in channels:
            answer = await _ask(channel)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert proxy.cut() == len(channels)
    finally:
        for channel in channels:
            await channel.close()
        await proxy.stop()
        await server.stop(0)


async def _ask(channel: grpc.aio.Channel) -> health_pb2.HealthCheckResponse:
    return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
