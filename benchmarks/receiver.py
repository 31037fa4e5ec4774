"""Stands where a telemetry collector would: takes whatever is exported over OTLP and drops it.

So that the mesh is measured with its telemetry on, and the collector's cost, which is not ours, is not counted.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc


class _TakesAll(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if not handler_call_details.method.startswith("/opentelemetry."):
            return None

        async def take(request: bytes, context: Any) -> bytes:
            return b""  # An empty Export...ServiceResponse: everything was taken.

        return grpc.unary_unary_rpc_method_handler(take)


async def serve() -> None:
    """Serve until SIGTERM; prints the address."""
    server = grpc.aio.server(handlers=(_TakesAll(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(serve())
