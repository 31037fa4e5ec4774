"""Internal channels and the server's edge, between real servers: what is left out, retried, cut short and refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from lending.bureau.v1 import bureau_service_pb2 as bureau_pb
from lending.bureau.v1.bureau_service_pb2_grpc import BureauServiceServicer, BureauServiceStub
from lending.bureau.v1.bureau_service_pb2_grpc import add_BureauServiceServicer_to_server as add_bureau
from lending.intake.v1 import intake_service_pb2 as intake_pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceServicer, IntakeServiceStub
from lending.intake.v1.intake_service_pb2_grpc import add_IntakeServiceServicer_to_server as add_intake
from lending.scoring.v1 import scoring_service_pb2 as pb
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceStub
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime import deadline
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.errors import Overloaded
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import ServerSettings
from tests.builders import a_profile, an_application
from tests.integration.servers import CLOCK, PLAIN, Server, code, failing, hang, servers

if TYPE_CHECKING:
    from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceAsyncStub

PATIENCE_S = 20.0
"""How long a test waits for what must come; far above what it takes, so that a busy machine fails nothing."""
ROUNDED_UP_S_MAX = 0.012
REQUEST = pb.ScoreProfilesRequest(
    items=[pb.ScoreProfilesRequest.Item(key="k", party_kind=Party.KIND_PERSON, profile=a_profile("person", 1))]
)


@asynccontextmanager
async def channel_to(servers: list[Server], deadline_s: float = 5.0) -> AsyncIterator[ScoringServiceAsyncStub]:
    async with open_channel(
        ",".join(s.address for s in servers), CLOCK, lambda _: deadline_s, service="bureau", tls=PLAIN
    ) as channel:
        stub = ScoringServiceStub(channel)
        # Until each was seen: a channel begins with whichever connection is there first.
        await until(lambda: all(s.scoring.calls for s in servers), stub.ScoreProfiles)
        yield stub


async def until(holds: Callable[[], bool], call: Callable[[pb.ScoreProfilesRequest], Any]) -> float:
    """Call again and again until the condition holds; how long that took, seconds."""
    started = CLOCK.monotonic()
    while not holds():
        assert CLOCK.monotonic() - started < PATIENCE_S, "it never came"
        await code(call(REQUEST))
        await CLOCK.sleep(0.001)
    return CLOCK.monotonic() - started


async def test_a_server_that_says_it_is_not_serving_is_left_within_moments_and_comes_back() -> None:
    async with servers(2) as (leaving, staying), channel_to([leaving, staying]) as stub:
        await leaving.set_health(serving=False)
        started, last = CLOCK.monotonic(), leaving.scoring.calls
        left_after_s, alone = 0.0, 0
        while alone < 50:  # So many in a row to the other: it was left.
            assert await code(stub.ScoreProfiles(REQUEST)) is grpc.StatusCode.OK
            alone += 1
            if leaving.scoring.calls != last:
                last, alone, left_after_s = leaving.scoring.calls, 0, CLOCK.monotonic() - started
                assert left_after_s < PATIENCE_S, "it never left"
        print(f"the last call arrived {left_after_s * 1000:.0f} ms after NOT_SERVING")
        await leaving.set_health(serving=True)
        await until(lambda: leaving.scoring.calls > last, stub.ScoreProfiles)


@pytest.mark.parametrize("trouble", ["failing", "hung"])
async def test_a_sick_server_is_ejected_and_the_well_one_carries_on(trouble: str) -> None:
    async with servers(2) as (sick, well), channel_to([sick, well], deadline_s=0.3) as stub:
        sick.scoring.does = failing(grpc.StatusCode.INTERNAL) if trouble == "failing" else hang
        started, alone, failed = CLOCK.monotonic(), 0, 0
        while alone < 100:
            assert CLOCK.monotonic() - started < PATIENCE_S, "it was never ejected"
            before = sick.scoring.calls
            # A few at a time, as intake has batches: a hung server swallows them all before it is noticed.
            codes = await asyncio.gather(*(code(stub.ScoreProfiles(REQUEST)) for _ in range(4)))
            failed += sum(c is not grpc.StatusCode.OK for c in codes)
            alone = alone + 4 if sick.scoring.calls == before else 0
        assert failed
        print(f"{trouble}: ejected after {failed} failed calls, {CLOCK.monotonic() - started:.2f} s")
        if trouble == "failing":  # Back after five seconds; once is enough to wait for.
            sick.scoring.does = None
            seen = sick.scoring.calls
            await until(lambda: sick.scoring.calls > seen, stub.ScoreProfiles)


async def test_only_unavailable_is_retried() -> None:
    async with servers(1) as (server,), channel_to([server]) as stub:
        for status in (
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.FAILED_PRECONDITION,
        ):
            server.scoring.does, before = failing(status), server.scoring.calls
            assert await code(stub.ScoreProfiles(REQUEST)) is status
            assert server.scoring.calls == before + 1

        attempts = Counter[str]()

        async def once(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            attempts["failed"] += 1
            if attempts["failed"] == 1:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as told")

        server.scoring.does = once
        assert await code(stub.ScoreProfiles(REQUEST)) is grpc.StatusCode.OK
        assert attempts["failed"] == 2


async def test_a_service_that_is_down_gets_at_most_a_tenth_more_attempts_than_calls() -> None:
    async with servers(1) as (server,), channel_to([server]) as stub:
        server.scoring.does, server.scoring.calls = failing(grpc.StatusCode.UNAVAILABLE), 0
        calls = 0
        for _ in range(30):
            codes = await asyncio.gather(*(code(stub.ScoreProfiles(REQUEST)) for _ in range(10)))
            assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
            calls += len(codes)
        print(f"{server.scoring.calls} attempts for {calls} calls: {server.scoring.calls / calls:.3f}x")
        assert server.scoring.calls <= 1.1 * calls


@pytest.mark.parametrize("timeout_s", [0.5, 2.0])
async def test_a_deadline_shrinks_from_hop_to_hop(timeout_s: float) -> None:
    async with servers(2) as (first, second), channel_to([second]) as onward, channel_to([first]) as stub:

        async def pass_on(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await onward.ScoreProfiles(REQUEST)

        first.scoring.does = pass_on
        await stub.ScoreProfiles(REQUEST, timeout=timeout_s)
        # On the wire deadlines of seconds are rounded up by 11 ms at most; the reserve must make up for more.
        seen = (first.scoring.left_s[-1], second.scoring.left_s[-1])
        print(f"{timeout_s} s at the caller, {seen[0]:.4f} s at the first server, {seen[1]:.4f} s at the second")
        assert seen[0] <= timeout_s + ROUNDED_UP_S_MAX
        assert seen[1] <= seen[0] - deadline.RESERVE_S + ROUNDED_UP_S_MAX


async def test_a_call_with_nothing_left_never_leaves() -> None:
    async with servers(1) as (server,), channel_to([server]) as stub:
        before = server.scoring.calls
        deadline.note(CLOCK.monotonic())
        assert await code(stub.ScoreProfiles(REQUEST)) is grpc.StatusCode.DEADLINE_EXCEEDED
        deadline.note(None)
        assert await code(stub.ScoreProfiles(REQUEST)) is grpc.StatusCode.OK
        assert server.scoring.calls == before + 1


@pytest.mark.parametrize("how", ["cancelled", "timed_out"])
async def test_a_caller_that_gives_up_ends_the_handler(how: str) -> None:
    async with servers(1) as (server,), channel_to([server]) as stub:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def work(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        server.scoring.does = work
        caller = asyncio.create_task(code(stub.ScoreProfiles(REQUEST, timeout=0.3 if how == "timed_out" else None)))
        async with asyncio.timeout(PATIENCE_S):
            await begun.wait()
            given_up = CLOCK.monotonic()
            if how == "cancelled":
                caller.cancel()
            await ended.wait()
        print(f"{how}: the handler ended {(CLOCK.monotonic() - given_up) * 1000:.0f} ms after")
        await asyncio.wait([caller])


async def test_connections_age_without_failing_a_call() -> None:
    """Each new connection is a chance to find a new replica; calls under way end on the old one."""
    async with servers(1, ServerSettings(max_connection_age_s=0.2)) as (server,), channel_to([server]) as stub:

        async def a_while(context: grpc.aio.ServicerContext[Any, Any]) -> None:
            await CLOCK.sleep(0.05)

        server.scoring.does = a_while
        codes: Counter[grpc.StatusCode] = Counter()
        started = CLOCK.monotonic()
        while len(server.scoring.peers) < 4:
            assert CLOCK.monotonic() - started < PATIENCE_S, "connections do not age"
            codes.update(await asyncio.gather(*(code(stub.ScoreProfiles(REQUEST)) for _ in range(4))))
        assert set(codes) == {grpc.StatusCode.OK}


class Untouched(IntakeServiceServicer, BureauServiceServicer):
    """Handlers that must not be reached, but for one that says it is full."""

    def __init__(self) -> None:
        self.reached = 0

    async def SubmitApplication(self, request: Any, context: Any) -> Any:
        self.reached += 1
        raise Overloaded("full", retry_s=0.25)

    async def GatherProfiles(self, request: Any, context: Any) -> Any:
        self.reached += 1
        return bureau_pb.GatherProfilesResponse()


@asynccontextmanager
async def edge() -> AsyncIterator[tuple[Untouched, grpc.aio.Channel]]:
    server = make_server(ServerSettings(), CLOCK)
    untouched = Untouched()  # type: ignore[abstract]  # So are the methods that no test calls.
    add_intake(untouched, server)
    add_bureau(untouched, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield untouched, channel
    await server.stop(0)


def a_submit() -> intake_pb.SubmitApplicationRequest:
    return intake_pb.SubmitApplicationRequest(
        parent="lenders/demo", request_id="request-1", application=an_application()
    )


async def test_an_unknown_priority_is_named() -> None:
    async with edge() as (untouched, channel):
        request = a_submit()
        request.application.priority = 99  # type: ignore[assignment]  # What no enum value has.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await IntakeServiceStub(channel).SubmitApplication(request)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "application.priority" in (refused.value.details() or "")
        assert not untouched.reached


async def test_a_batch_above_the_limit_is_named() -> None:
    async with edge() as (untouched, channel):
        party = an_application().parties[0]
        item = bureau_pb.GatherProfilesRequest.Item(key="k", lender="lenders/demo", party=party)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await BureauServiceStub(channel).GatherProfiles(bureau_pb.GatherProfilesRequest(items=[item] * 257))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "items" in (refused.value.details() or "")
        assert not untouched.reached


async def test_a_message_above_the_limit_is_refused_without_a_time_to_come_back() -> None:
    async with edge() as (untouched, channel):
        request = a_submit()
        request.application.channel = "x" * (ServerSettings().max_message_mib * 1024 * 1024)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await IntakeServiceStub(channel).SubmitApplication(request)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in (refused.value.details() or "")
        assert "grpc-retry-pushback-ms" not in dict(refused.value.trailing_metadata() or ())
        assert not untouched.reached


async def test_a_full_server_says_when_to_come_back() -> None:
    async with edge() as (_, channel):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await IntakeServiceStub(channel).SubmitApplication(a_submit())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ("grpc-retry-pushback-ms", "250") in [(k, v) for k, v in refused.value.trailing_metadata() or ()]


@pytest.mark.parametrize("timeout_s", [-1.0, 0.0, 1e-9])
async def test_a_past_deadline_reaches_no_handler_and_harms_nobody_else(timeout_s: float) -> None:
    async with edge() as (untouched, channel):
        stub = IntakeServiceStub(channel)
        late = [code(stub.SubmitApplication(a_submit(), timeout=timeout_s)) for _ in range(20)]
        in_time = code(stub.SubmitApplication(a_submit(), timeout=PATIENCE_S))
        *lates, other = await asyncio.gather(*late, in_time)
        assert set(lates) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert other is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert untouched.reached == 1


async def test_bytes_that_are_no_message_are_refused_in_the_callers_terms() -> None:
    async with servers(1) as (server,), grpc.aio.insecure_channel(server.address) as channel:
        ask: Any = channel.unary_unary("/lending.scoring.v1.ScoringService/ScoreProfiles")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(b"\xff\xff\xff")
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "google.protobuf" not in str(refused.value.details())
