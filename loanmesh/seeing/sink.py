"""Where `loanmesh up` keeps traces: takes spans, logs and metrics over OTLP/gRPC and writes them to one file.

    python -m loanmesh.seeing.sink --listen 127.0.0.1:7406 --file STATE/traces.db

A process of its own, so that whatever befalls it befalls nobody else. Bounded in memory (exports that wait for the
disk; beyond, they are dropped and counted) and on disk (by age and size). Of metrics it keeps only who sent them when.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb

from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.runtime.supervised import end_with_supervisor
from loanmesh.seeing.otlp import logs_of, processes_of, spans_of
from loanmesh.seeing.spans import Log, Span
from loanmesh.seeing.store import TraceFile

WAITING_MAX = 200
"""Exports of up to 512 spans that wait for the disk."""
KEEP_S = 86_400.0
KEEP_BYTES = 256 * 1024 * 1024
TRIM_EVERY_S = 30.0
MESSAGE_BYTES_MAX = 16 * 1024 * 1024
Export = trace_pb.ExportTraceServiceRequest | logs_pb.ExportLogsServiceRequest | metrics_pb.ExportMetricsServiceRequest


class Sink:
    """Takes exports, and has them written by a thread, in groups."""

    def __init__(
        self, file: TraceFile, clock: Clock, say: Callable[[str], None], waiting_max: int = WAITING_MAX
    ) -> None:
        self._file = file
        self._clock = clock
        self._say = say
        self._waiting: asyncio.Queue[Export] = asyncio.Queue(waiting_max)
        self.dropped = 0
        """Exports that found no room."""
        self._complained_at = float("-inf")
        self._turn = asyncio.Lock()

    def take(self, export: Export) -> None:
        """Keep it soon; never waits."""
        try:
            self._waiting.put_nowait(export)
        except asyncio.QueueFull:
            self.dropped += 1

    async def write_forever(self) -> None:
        """Write what came, until cancelled; what still waits then is written too."""
        try:
            while True:
                await self._write([await self._waiting.get()])
        except asyncio.CancelledError:
            await self._write([])
            raise

    async def trim_forever(self, keep_s: float = KEEP_S, keep_bytes: int = KEEP_BYTES) -> None:
        """Keep the file within its bounds, until cancelled."""
        while True:
            await self._on_disk(lambda: self._file.trim(self._clock.now().timestamp(), keep_s, keep_bytes))
            await self._clock.sleep(TRIM_EVERY_S)

    async def _write(self, exports: list[Export]) -> None:
        while not self._waiting.empty():
            exports.append(self._waiting.get_nowait())
        await self._on_disk(lambda: self._keep(exports))

    def _keep(self, exports: list[Export]) -> None:
        spans: list[Span] = []
        logs: list[Log] = []
        seen: dict[str, tuple[str, float]] = {}
        now = self._clock.now().timestamp()
        for export in exports:
            for name, service in processes_of(export):
                seen[name] = (service, now)
            if isinstance(export, trace_pb.ExportTraceServiceRequest):
                spans += spans_of(export)
            elif isinstance(export, logs_pb.ExportLogsServiceRequest):
                logs += logs_of(export)
        self._file.write(spans, logs, seen)

    async def _on_disk(self, work: Callable[[], None]) -> None:
        # One at a time, as the file needs it; what comes meanwhile waits in the queue.
        async with self._turn:
            try:
                await asyncio.to_thread(work)
            except sqlite3.Error as error:
                if self._clock.monotonic() - self._complained_at > 60:
                    self._complained_at = self._clock.monotonic()
                    self._say(f"traces are not kept: {error}")


_TYPES: dict[str, tuple[type[Any], type[Any]]] = {
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": (
        trace_pb.ExportTraceServiceRequest, trace_pb.ExportTraceServiceResponse),
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export": (
        logs_pb.ExportLogsServiceRequest, logs_pb.ExportLogsServiceResponse),
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export": (
        metrics_pb.ExportMetricsServiceRequest, metrics_pb.ExportMetricsServiceResponse),
}  # fmt: skip


class Handlers(grpc.GenericRpcHandler):
    """The three OTLP services."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of one of them."""
        types = _TYPES.get(handler_call_details.method)
        if types is None:
            return None
        request_type, response_type = types

        async def export(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._sink.take(request_type.FromString(data))
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the bytes are no such message")
            return response_type()

        return grpc.unary_unary_rpc_method_handler(export, None, response_type.SerializeToString)


async def serve(listen: str, file: Path, clock: Clock) -> None:
    """Until SIGTERM, SIGINT, or the supervisor's end. Raises OSError where it cannot listen or open the file."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    end_with_supervisor(stopping.set)
    try:
        kept = TraceFile(file)
    except sqlite3.Error as error:
        raise OSError(f"{file} cannot be opened: {error}") from error
    sink = Sink(kept, clock, lambda text: print(text, file=sys.stderr, flush=True))
    server = grpc.aio.server(
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)],
    )
    server.add_generic_rpc_handlers((Handlers(sink),))
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {listen}: the port is in use or not allowed") from error
    await server.start()
    work = [asyncio.create_task(sink.write_forever()), asyncio.create_task(sink.trim_forever())]
    print(json.dumps({"ready": "sink", "address": f"{listen.rsplit(':', 1)[0]}:{port}"}), flush=True)
    await stopping.wait()
    await server.stop(0.5)
    for task in work:
        task.cancel()
    await asyncio.wait(work)
    kept.close()


def main() -> int:
    """Run the sink; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", default="127.0.0.1:0", help="HOST:PORT")
    parser.add_argument("--file", type=Path, required=True, help="where to keep traces")
    asked = parser.parse_args()
    try:
        asyncio.run(serve(asked.listen, asked.file, SystemClock()))
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
