"""One bare service: answers an empty unary call, after asking the next one, if there is one. The limit of the stack."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty

METHOD = "/bench.Hop/Pass"


async def serve(next_address: str) -> None:
    """Serve until SIGTERM; prints the port."""
    channel = grpc.aio.insecure_channel(next_address) if next_address else None
    ask = channel.unary_unary(METHOD, Empty.SerializeToString, Empty.FromString) if channel else None

    async def answer(request: Any, context: Any) -> Empty:
        return await ask(request) if ask else Empty()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer, Empty.FromString, Empty.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Hop", {"Pass": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(1)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(sys.argv[1] if len(sys.argv) > 1 else ""))
