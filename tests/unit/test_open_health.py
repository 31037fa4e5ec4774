"""Health for strangers: so many at once, and their message unread."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2

from loanmesh.runtime.open_health import OpenHealth


class Aborted(Exception):
    """What ends a call that is refused."""


class Context:
    """Keeps what a call was answered."""

    def __init__(self) -> None:
        self.written: list[health_pb2.HealthCheckResponse] = []

    async def write(self, answer: health_pb2.HealthCheckResponse) -> None:
        self.written.append(answer)

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        raise Aborted(f"{code.name}: {details}")


async def test_so_many_watch_at_once_and_one_who_leaves_makes_room() -> None:
    begun, leave = asyncio.Semaphore(0), asyncio.Event()

    async def watch(request: health_pb2.HealthCheckRequest, context: Context) -> None:
        assert request.service == "", "of the service as a whole, whatever they ask for"
        await context.write(health_pb2.HealthCheckResponse(status="SERVING"))
        begun.release()
        await leave.wait()

    bounded = OpenHealth(at_once_max=2).handler(grpc.unary_stream_rpc_method_handler(watch))

    def call(context: Context) -> Any:
        return bounded.stream_stream(None, cast(Any, context))

    contexts = [Context(), Context()]
    watching = [asyncio.create_task(call(context)) for context in contexts]
    for _ in watching:
        await begun.acquire()
    assert all(len(context.written) == 1 for context in contexts)
    with pytest.raises(Aborted, match="RESOURCE_EXHAUSTED"):
        await call(Context())
    leave.set()
    await asyncio.gather(*watching)
    after = Context()
    await call(after)
    assert len(after.written) == 1
