"""The client over real connections: what only the wire can show."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceServicer, add_IntakeServiceServicer_to_server

from loanmesh.client import CallFailed, Client, Decided, Overloaded, Submitted, SyncClient, Unreachable
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.errors import Overloaded as Busy
from loanmesh.runtime.errors import RequestIdConflict
from loanmesh.runtime.server import ServerInterceptor
from loanmesh.runtime.status import item_status
from loanmesh.runtime.throttle import ThrottleSettings
from tests.builders import an_application

CLOCK = SystemClock()
NAME = f"lenders/demo/applications/{'0' * 36}"


class Intake(IntakeServiceServicer):
    """Stores by request_id and does what `then` says for each call, before or instead."""

    def __init__(self) -> None:
        self.stored: Counter[str] = Counter()
        self.metadata: list[dict[str, Any]] = []
        self.remaining_s: list[float | None] = []
        self.under_way = self.cancelled = 0
        self.early = False
        self.decided = asyncio.Event()
        self.then: Callable[[Any], Any] | None = None

    async def _arrived(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.remaining_s.append(context.time_remaining())
        if self.then:
            await self.then(context)

    @contextlib.asynccontextmanager
    async def _noted(self, items: int = 1) -> AsyncIterator[None]:
        self.under_way += items
        try:
            yield
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= items

    async def SubmitApplication(self, request: pb.SubmitApplicationRequest, context: Any) -> Any:
        async with self._noted():
            await self._arrived(context)
            self.stored[request.request_id] += 1
            application = pb.Application(name=NAME, state=pb.Application.STATE_PENDING, revision=1)
            if request.HasField("wait"):
                if self.early:
                    await context.send_initial_metadata((("loanmesh-queue-ms", "3"),))
                await self.decided.wait()
                application.state = pb.Application.STATE_DECIDED
            elif self.early:
                context.set_trailing_metadata((("loanmesh-queue-ms", "3"),))
            return pb.SubmitApplicationResponse(application=application)

    async def BatchSubmitApplications(self, request: pb.BatchSubmitApplicationsRequest, context: Any) -> Any:
        answer = pb.BatchSubmitApplicationsResponse()
        async with self._noted(len(request.requests)):
            await self._arrived(context)
            state = pb.Application.STATE_PENDING
            if request.HasField("wait"):
                await context.send_initial_metadata((("loanmesh-queue-ms", "3"),))
                await self.decided.wait()
                state = pb.Application.STATE_DECIDED
            for item in request.requests:
                self.stored[item.request_id] += 1
                answer.results.add(request_id=item.request_id, application=pb.Application(name=NAME, state=state))
            return answer

    async def GetApplication(self, request: pb.GetApplicationRequest, context: Any) -> Any:
        await self._arrived(context)
        return pb.GetApplicationResponse(application=pb.Application(name=request.name))

    async def WatchApplication(self, request: pb.WatchApplicationRequest, context: Any) -> AsyncIterator[Any]:
        async with self._noted():
            await self._arrived(context)
            yield pb.WatchApplicationResponse(application=pb.Application(name=NAME, revision=1))
            await self.decided.wait()
            yield pb.WatchApplicationResponse(application=pb.Application(name=NAME, revision=2))


class Running:
    """A server on loopback."""

    def __init__(self) -> None:
        self.intake = Intake()  # type: ignore[abstract]  # Only what the tests call; the rest is UNIMPLEMENTED, as on the wire.
        self.port = 0
        self.server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> Running:
        self.server = grpc.aio.server(interceptors=[ServerInterceptor(CLOCK)], options=[("grpc.so_reuseport", 0)])
        add_IntakeServiceServicer_to_server(self.intake, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()
        return self

    async def stop(self) -> None:
        assert self.server
        await self.server.stop(0)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    started = await Running().start()
    yield started
    await started.stop()


def times(count: int, fault: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The fault for so many calls, then none."""
    left = [count]

    async def then(context: Any) -> None:
        if left[0]:
            left[0] -= 1
            await fault(context)

    return then


async def hang(_: Any) -> None:
    await asyncio.Event().wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await CLOCK.sleep(0.005)


async def test_a_retry_is_ours_not_grpcs_and_carries_the_same_request_id(running: Running) -> None:
    async def fail(context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    running.intake.then = times(2, fail)
    async with Client(running.address, client_id="app") as client:
        await client.submit(an_application())
    assert len(running.intake.metadata) == 3
    assert list(running.intake.stored.values()) == [1]
    assert not any("grpc-previous-rpc-attempts" in sent for sent in running.intake.metadata)
    assert {(sent["loanmesh-client"], sent["loanmesh-priority"]) for sent in running.intake.metadata} == {
        ("app", "interactive")
    }


@pytest.mark.parametrize("header", [True, False])
async def test_a_servers_wish_is_honoured_in_either_form(running: Running, header: bool) -> None:
    async def busy(context: Any) -> None:
        if header:
            raise Busy("too much", 0.4)
        details = item_status(Busy("too much", 0.4)).SerializeToString()
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", (("grpc-status-details-bin", details),))

    running.intake.then = times(1, busy)
    started = CLOCK.monotonic()
    async with Client(running.address) as client:
        await client.submit(an_application())
        assert client.in_flight_limit == 2  # Half of what it began with.
    assert CLOCK.monotonic() - started >= 0.4


async def test_details_of_a_refusal_arrive(running: Running) -> None:
    async def conflict(_: Any) -> None:
        raise RequestIdConflict("used before", fields="loan")

    running.intake.then = conflict
    async with Client(running.address) as client:
        with pytest.raises(CallFailed, match="used before") as failed:
            await client.submit(an_application())
    assert (failed.value.code, failed.value.reason) == ("ALREADY_EXISTS", "REQUEST_ID_CONFLICT")
    assert failed.value.metadata == {"fields": "loan"}


async def test_the_deadline_travels_with_each_attempt(running: Running) -> None:
    async with Client(running.address) as client:
        await client.submit(an_application(), deadline_s=0.7)
        await client.get(NAME, deadline_s=0.5)
        running.intake.decided.set()
        await client.submit(an_application(), wait_s=2, deadline_s=2)
    bounds = (0.7, 0.5, 2.0)
    for seen, bound in zip(running.intake.remaining_s, bounds, strict=True):
        assert seen is not None
        assert bound - 0.4 < seen < bound + 0.1  # In whole milliseconds, and then some.


async def test_a_cancelled_caller_cancels_the_handler(running: Running) -> None:
    running.intake.then = hang
    async with Client(running.address) as client:
        for number, wait_s in enumerate((0.0, 5.0), start=1):
            call = asyncio.create_task(client.submit(an_application(), wait_s=wait_s))
            await until(lambda: running.intake.under_way == 1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await until(lambda number=number: running.intake.cancelled == number)  # type: ignore[misc]  # A default binds it.
        running.intake.then = None
        changes = client.watch(NAME)
        await anext(changes)
        await changes.aclose()
        await until(lambda: running.intake.under_way == 0)


async def test_who_waits_holds_no_place_once_it_is_acknowledged(running: Running) -> None:
    running.intake.early = True
    async with Client(running.address, throttle=ThrottleSettings(initial=2, floor=2, ceiling=2)) as client:
        waiting = [asyncio.create_task(client.submit_and_wait(an_application(), deadline_s=30)) for _ in range(10)]
        await until(lambda: running.intake.under_way == 10)
        await client.submit(an_application())
        running.intake.decided.set()
        assert {type(answer) for answer in await asyncio.gather(*waiting)} == {Decided}
    assert set(running.intake.stored.values()) == {1}


async def test_a_closed_client_leaves_nobody_waiting(running: Running) -> None:
    running.intake.then = hang
    async with Client(running.address, throttle=ThrottleSettings(initial=12)) as client:
        calls = [asyncio.create_task(client.submit(an_application())) for _ in range(12)]
        await until(lambda: running.intake.under_way == 12)
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(one) for one in ended} == {asyncio.CancelledError}


async def test_one_that_is_known_to_acknowledge_and_hangs_is_not_waited_for(running: Running) -> None:
    running.intake.early = True
    running.intake.decided.set()
    async with Client(running.address) as client:
        await client.submit(an_application(), wait_s=20)
        running.intake.then = times(1, hang)
        started = CLOCK.monotonic()
        await client.submit(an_application(), wait_s=20)
        assert CLOCK.monotonic() - started < 10


async def test_a_server_that_does_not_acknowledge_early_is_waited_for(running: Running) -> None:
    async with Client(running.address) as client:
        call = asyncio.create_task(client.submit(an_application(), wait_s=20))
        await CLOCK.sleep(1.3)  # Longer than an attempt may take that waits for nothing.
        running.intake.decided.set()
        assert (await call).state == pb.Application.STATE_DECIDED
    assert list(running.intake.stored.values()) == [1]


async def test_a_killed_replica_and_a_hanging_one_cost_retries_not_failures() -> None:
    replicas = [await Running().start() for _ in range(3)]
    try:
        async with Client(",".join(replica.address for replica in replicas)) as client:
            await until_all_answer(client, replicas)
            replicas[0].intake.then = hang
            await replicas[1].stop()
            await asyncio.gather(*(client.submit(an_application(), deadline_s=10) for _ in range(60)))
            served = sum(len(replica.intake.stored) for replica in replicas)
            assert served >= 60
    finally:
        for replica in (replicas[0], replicas[2]):
            await replica.stop()


async def until_all_answer(client: Client, replicas: list[Running]) -> None:
    async with asyncio.timeout(10):
        while not all(replica.intake.stored for replica in replicas):
            await client.submit(an_application())


async def test_a_mesh_that_comes_back_is_found_again(running: Running) -> None:
    async with Client(running.address) as client:
        await client.get(NAME)
        await running.stop()
        call = asyncio.create_task(client.get(NAME))
        await CLOCK.sleep(0.5)
        assert not call.done()
        await running.start()
        assert (await call).name == NAME


async def test_a_watch_goes_on_at_the_replica_that_is_left() -> None:
    first, second = await Running().start(), await Running().start()
    try:
        async with Client(f"{first.address},{second.address}") as client:
            await until_all_answer(client, [first, second])
            changes = client.watch(NAME)
            seen = [(await anext(changes)).revision]
            watched, other = (first, second) if first.intake.under_way else (second, first)
            await watched.stop()
            other.intake.decided.set()
            seen += [changed.revision async for changed in changes]
            assert seen == [1, 2]
    finally:
        await other.stop()


async def test_nobody_there_is_unreachable_by_the_deadline() -> None:
    async with Client("127.0.0.1:1") as client:
        started = CLOCK.monotonic()
        with pytest.raises(Unreachable) as failed:
            await client.submit(an_application(), request_id="request-1", deadline_s=0.5)
        assert failed.value.request_id == "request-1"
        assert not isinstance(failed.value, Overloaded)
        assert CLOCK.monotonic() - started < 2


async def test_names_for_several_addresses_are_refused_with_a_reason() -> None:
    with pytest.raises(ValueError, match="must be IP addresses"):
        Client("one:7401,two:7401")


async def test_a_message_beyond_the_limit_is_refused_not_repeated(running: Running) -> None:
    application = an_application()
    application.channel = "x" * 5_000_000  # This server takes gRPC's default, 4 MiB.
    async with Client(running.address) as client:
        with pytest.raises(CallFailed, match="larger than max"):
            await client.submit(application)


# --- Not asynchronous ---


async def test_the_blocking_client_serves_several_threads(running: Running, tmp_path: Path) -> None:
    running.intake.decided.set()

    def work(client: SyncClient, number: int) -> set[str]:
        kept = [client.submit(an_application()).name for _ in range(5)]
        assert isinstance(client.submit_and_wait(an_application(), deadline_s=5), Decided)
        assert [changed.revision for changed in client.watch(NAME)] == [1, 2]
        many = list(client.submit_many((an_application() for _ in range(7)), resume=tmp_path / f"{number}"))
        assert all(isinstance(result, Submitted) for result in many)
        return set(kept)

    def all_threads() -> None:
        with SyncClient(running.address) as client, ThreadPoolExecutor(4) as threads:
            for names in threads.map(lambda number: work(client, number), range(4)):
                assert names == {NAME}
        with pytest.raises(RuntimeError, match="closed"):
            client.get(NAME)
        client.close()

    await asyncio.to_thread(all_threads)
    assert len(running.intake.stored) == 4 * (5 + 1 + 1)  # The seven are one, by content.


async def test_the_blocking_client_reads_the_source_in_the_callers_thread_and_not_far_ahead(running: Running) -> None:
    import threading

    seen: set[int] = set()
    read = furthest = 0

    def source() -> Any:
        nonlocal read
        for number in range(6000):
            seen.add(threading.get_ident())
            read += 1
            yield f"request-{number}", pb.Application()

    def work() -> int:
        nonlocal furthest
        taken = 0
        with SyncClient(running.address) as client:
            for _ in client.submit_many(source()):
                taken += 1
                furthest = max(furthest, read - taken)
        return threading.get_ident() if taken == 6000 else 0

    assert seen == {await asyncio.to_thread(work)}
    assert furthest < 6000
    assert len(running.intake.stored) == 6000


def test_a_wrong_argument_is_told_where_the_blocking_client_is_made() -> None:
    with pytest.raises(ValueError, match="must be IP addresses"):
        SyncClient("one:7401,two:7401")
    with pytest.raises(TypeError):
        SyncClient("127.0.0.1:1", colour="red")


async def test_ctrl_c_ends_a_blocked_caller_and_its_call(running: Running) -> None:
    running.intake.then = hang
    program = textwrap.dedent(f"""
        from lending.intake.v1.intake_service_pb2 import Application
        from loanmesh.client import SyncClient
        with SyncClient("{running.address}") as client:
            try:
                client.submit(Application.FromString({an_application().SerializeToString()!r}), wait_s=50)
            except KeyboardInterrupt:
                print("interrupted", flush=True)
                raise
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        await until(lambda: running.intake.under_way == 1)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            said, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert said == b"interrupted\n"
    assert complained.rstrip().endswith(b"KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    await until(lambda: running.intake.under_way == 0)
    assert running.intake.cancelled == 1
