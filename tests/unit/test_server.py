"""The server's interceptor: what comes too late is not begun, and what is begun knows its deadline."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from lending.scoring.v1 import scoring_service_pb2 as pb

from loanmesh.runtime import deadline
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.server import BUDGET_S_MIN, ServerInterceptor
from tests.builders import a_profile


class Aborted(grpc.aio.AbortError):
    """The call was refused."""


class Context:
    """A call's context with so much time left."""

    def __init__(self, left_s: float | None) -> None:
        self.left_s = left_s
        self.code: grpc.StatusCode | None = None

    def time_remaining(self) -> float | None:
        return self.left_s

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: object = ()) -> None:
        self.code = code
        raise Aborted


async def serve(left_s: float | None, request: pb.ScoreProfilesRequest) -> tuple[list[float], grpc.StatusCode | None]:
    """For each time the handler ran the seconds it may give to a call of its own; and the status refused with."""
    clock = FakeClock()
    ran = []

    async def handler(request: object, context: object) -> None:
        ran.append(deadline.remaining_s(clock.monotonic(), 60.0))

    async def continuation(details: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(cast(Any, handler), pb.ScoreProfilesRequest.FromString)

    details = SimpleNamespace(method="/lending.scoring.v1.ScoringService/ScoreProfiles", invocation_metadata=())
    wrapped = await ServerInterceptor(clock).intercept_service(continuation, cast(Any, details))
    context = Context(left_s)
    try:
        await wrapped.unary_unary(request.SerializeToString(), context)
    except Aborted:
        assert context.code
    deadline.note(None)
    return ran, context.code


SOUND = pb.ScoreProfilesRequest(items=[{"key": "k", "party_kind": 1, "profile": a_profile("person", 1)}])  # type: ignore[list-item]  # A dict stands for the message.


@pytest.mark.parametrize("left_s", [-1.0, 0.0, BUDGET_S_MIN / 2])
async def test_a_call_without_time_is_not_begun(left_s: float) -> None:
    assert await serve(left_s, SOUND) == ([], grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_time_is_looked_at_before_the_request_is() -> None:
    assert await serve(0.0, pb.ScoreProfilesRequest()) == ([], grpc.StatusCode.DEADLINE_EXCEEDED)
    assert await serve(1.0, pb.ScoreProfilesRequest()) == ([], grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize(("left_s", "onward_s"), [(1.0, 1.0 - deadline.RESERVE_S), (None, 60.0)])
async def test_a_call_in_time_is_begun_and_passes_on_what_is_left(left_s: float | None, onward_s: float) -> None:
    ran, code = await serve(left_s, SOUND)
    assert code is None
    assert ran == [pytest.approx(onward_s)]
