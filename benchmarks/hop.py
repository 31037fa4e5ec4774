"""One bare service: answers an empty unary call, after asking the next ones, all at once, if there are any.

    python -m benchmarks.hop [NEXT[,NEXT...]]

The limit of the stack: nothing a service of ours does can cost less than this.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import uvloop
from google.protobuf.empty_pb2 import Empty

METHOD = "/bench.Hop/Pass"


async def serve(addresses: list[str]) -> None:
    """Serve until SIGTERM; prints the address."""
    channels = [grpc.aio.insecure_channel(address) for address in addresses]
    asks = [channel.unary_unary(METHOD, Empty.SerializeToString, Empty.FromString) for channel in channels]

    async def answer(request: Any, context: Any) -> Empty:
        if len(asks) == 1:
            return await asks[0](request)
        await asyncio.gather(*(ask(request) for ask in asks))
        return Empty()

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(answer, Empty.FromString, Empty.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Hop", {"Pass": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    await stopping.wait()
    await server.stop(1)
    await asyncio.gather(*(channel.close() for channel in channels))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve([address for address in "".join(sys.argv[1:]).split(",") if address]))
