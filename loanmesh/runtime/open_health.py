"""Health for whoever asks, where nobody has shown who they are."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2

PREFIX = "/grpc.health.v1.Health/"
AT_ONCE_MAX = 4_000
"""Calls under way, nearly all of them watches: as many as there may be connections, and once more."""
_WHOLE = health_pb2.HealthCheckRequest(service="")


class OpenHealth:
    """Answers for the service as a whole, to so many at once, and takes no caller's message: it may be megabytes."""

    def __init__(self, at_once_max: int = AT_ONCE_MAX) -> None:
        self._most = at_once_max
        self._open = 0

    def handler(self, health: Any) -> Any:
        """A handler in place of `health`, one of the health service's own."""
        behaviour = health.unary_unary or health.unary_stream

        async def answers(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            if self._open >= self._most:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._most} ask for health already")
            self._open += 1
            try:
                checked = await behaviour(_WHOLE, context)
                if checked is not None:  # A watch has written its answers itself.
                    await context.write(checked)
            finally:
                self._open -= 1

        # As a stream, whose messages gRPC receives when they are asked for: never.
        return grpc.stream_stream_rpc_method_handler(answers, bytes, health.response_serializer)
