"""Callers who are too big, too many or too slow: each is bounded, and a sound caller beside them notices nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1 import intake_service_pb2 as intake
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceServicer, add_IntakeServiceServicer_to_server
from lending.scoring.v1 import scoring_service_pb2 as pb
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceStub

from loanmesh.client import CallFailed
from loanmesh.client.calls import Attempts, Calls, Lane
from loanmesh.client.transport import SUBMIT, Failure, GrpcTransport
from loanmesh.runtime.budget import BudgetSettings
from loanmesh.runtime.errors import OverQuota
from loanmesh.runtime.limits import LimitSettings
from loanmesh.runtime.settings import ServerSettings
from loanmesh.runtime.throttle import ThrottleSettings
from services.intake.ports import Broken
from services.intake.watchers import Watchers
from tests.integration.raw_http2 import GOAWAY, RST_STREAM, Raw, gzip_of_zeros
from tests.integration.servers import CLOCK, Server, servers
from tests.integration.test_intake_mesh import CASES, scoring

SCORE = "/lending.scoring.v1.ScoringService/ScoreProfiles"
SMALL = pb.ScoreProfilesRequest(items=[pb.ScoreProfilesRequest.Item(key="k")])
PATIENCE_S = 20.0


@asynccontextmanager
async def a_server(**limits: float) -> AsyncIterator[tuple[Server, ScoringServiceStub]]:
    """A server that takes a mebibyte, and a sound caller who is connected before anybody misbehaves."""
    settings = ServerSettings(max_message_mib=1, limits=LimitSettings.model_validate(limits))
    async with servers(1, settings) as (server,), grpc.aio.insecure_channel(server.address) as channel:
        stub = ScoringServiceStub(channel)
        await is_well(stub)
        yield server, stub


@asynccontextmanager
async def an_intake(settings: ServerSettings) -> AsyncIterator[str]:
    """The door of an intake, with nobody behind it."""
    server = Server(settings)
    add_IntakeServiceServicer_to_server(IntakeServiceServicer(), server.server)  # type: ignore[abstract]  # By design.
    await server.serve()
    yield server.address
    await server.server.stop(0)


async def is_well(stub: Any) -> None:
    """A sound call is answered, now as before."""
    assert len((await stub.ScoreProfiles(SMALL, timeout=PATIENCE_S)).results) == 1


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


# --- Size ---


@pytest.mark.parametrize("compression", list(grpc.Compression))
async def test_a_message_too_large_is_refused_packed_or_not(compression: grpc.Compression) -> None:
    large = pb.ScoreProfilesRequest(items=[pb.ScoreProfilesRequest.Item(key="k" * (2 << 20))])
    async with a_server() as (server, stub):
        before = server.scoring.calls
        code, text = await refused(stub.ScoreProfiles(large, compression=compression))
        assert (code, "larger than max" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert server.scoring.calls == before
        await is_well(stub)


@pytest.mark.parametrize("packed", [False, True])
async def test_the_client_library_takes_too_large_for_a_mistake_and_never_repeats_it(packed: bool) -> None:
    request = intake.SubmitApplicationRequest(request_id="x" * (2 << 20))
    async with an_intake(ServerSettings(max_message_mib=1)) as address:
        transport = GrpcTransport(address)
        if packed:
            await transport._channel.close()
            transport._channel = grpc.aio.insecure_channel(address, compression=grpc.Compression.Gzip)
        sent: list[int] = []

        class Counting:
            """Counts what goes out."""

            async def unary(self, *args: Any) -> Any:
                sent.append(1)
                return await transport.unary(*args)

        calls = Calls(Counting(), (), BudgetSettings(), CLOCK, random.Random(1))  # type: ignore[arg-type]
        lane = Lane(ThrottleSettings(), Attempts(5.0, 20.0), CLOCK)
        with pytest.raises(CallFailed) as error:
            await calls.unary(SUBMIT, request, lane, deadline_s=PATIENCE_S)
        assert (error.value.code, len(sent)) == ("INVALID_ARGUMENT", 1)
        await transport.close()


async def test_a_gigabyte_in_a_megabyte_of_gzip_is_unpacked_to_the_limit_and_no_further(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(
        "import asyncio\n"
        "from loanmesh.runtime.settings import ServerSettings\n"
        "from tests.integration.servers import Server\n"
        "async def main():\n"
        "    server = Server(ServerSettings())\n"
        "    await server.serve()\n"
        "    print(server.address, flush=True)\n"
        "    await server.server.wait_for_termination()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, str(script), stdout=subprocess.PIPE)
    try:
        assert process.stdout
        address = (await process.stdout.readline()).decode().strip()
        before_kib = peak_kib(process.pid)
        bomb = await asyncio.to_thread(gzip_of_zeros, 1 << 30)
        async with asyncio.timeout(PATIENCE_S):
            raw = await Raw.connect(address)
            raw.call(1, SCORE, [("grpc-encoding", "gzip")])
            await raw.message(1, bomb, compressed=True)
            assert b"Decompressed message larger than max" in await raw.answer(1)
        await raw.close()
        # The limit is 8 MiB; what is unpacked beside what came in may be twice that.
        assert peak_kib(process.pid) - before_kib < 64 * 1024
        async with grpc.aio.insecure_channel(address) as channel:
            await is_well(ScoringServiceStub(channel))
    finally:
        process.kill()
        await process.wait()


def peak_kib(pid: int) -> int:
    """Most memory that the process ever held, KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


async def test_a_message_that_unfolds_to_far_more_than_its_size_is_the_callers_mistake() -> None:
    async with a_server() as (server, stub), grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary(SCORE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"\x0a\x00" * 520_000)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "fields, all levels together" in str(refused.value.details())
        await is_well(stub)


async def test_a_batch_whose_message_is_too_large_is_halved_and_the_one_that_is_alone_so_is_broken() -> None:
    async with scoring(None, ServerSettings(max_message_mib=1)) as (_, port, guard):
        large = CreditProfile()
        large.reports.add(source="x" * (2 << 20))
        cases = [*CASES, dataclasses.replace(CASES[0], profile=large)]
        told = await port.score(cases)
        assert [isinstance(one, Broken) for one in told] == [False] * len(CASES) + [True]
        assert told[-1] == Broken("scoring_refused", "RESOURCE_EXHAUSTED")
        assert guard.overloads == guard.failures == 0


# --- Metadata ---


@pytest.mark.parametrize(
    "metadata", [(("a", "x" * 9000),), tuple((f"h{n}", "") for n in range(1000))], ids=["one long", "many"]
)
async def test_metadata_is_bounded_in_size_and_number(metadata: tuple[tuple[str, str], ...]) -> None:
    async with a_server(metadata_kib=8) as (server, stub):
        before = server.scoring.calls
        code, text = await refused(stub.ScoreProfiles(SMALL, metadata=metadata))
        assert (code, "metadata size exceeds" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert "xxxx" not in text
        assert server.scoring.calls == before
        await is_well(stub)


async def test_the_client_library_takes_too_much_metadata_for_a_mistake() -> None:
    async with servers(1, ServerSettings(limits=LimitSettings(metadata_kib=8))) as (server,):
        transport = GrpcTransport(server.address)
        with pytest.raises(Failure) as failure:
            await transport.unary(SUBMIT, intake.SubmitApplicationRequest(), PATIENCE_S, [("a", "x" * 9000)])
        assert failure.value.code == "INVALID_ARGUMENT"
        await transport.close()


# --- Number and silence ---


async def test_who_connects_and_says_nothing_is_cut_off() -> None:
    async with a_server(handshake_s=0.2) as (server, stub):
        silent = [await Raw.connect(server.address, greet=False) for _ in range(20)]
        await is_well(stub)
        async with asyncio.timeout(PATIENCE_S):
            for raw in silent:
                await raw.closed.wait()
        await is_well(stub)
        for raw in silent:
            await raw.close()


async def test_who_drips_its_greeting_byte_by_byte_is_cut_off_too() -> None:
    async with a_server(handshake_s=0.5) as (server, _):
        raw = await Raw.connect(server.address, greet=False)
        async with asyncio.timeout(PATIENCE_S):
            for byte in b"PRI * HTTP/2.0\r\n" * 100:
                if raw.closed.is_set():
                    break
                raw.send(bytes([byte]))
                await CLOCK.sleep(0.05)
            await raw.closed.wait()
        await raw.close()


async def test_connections_are_bounded_and_room_comes_back() -> None:
    async with a_server(connections_max=4) as (server, stub):
        raws = [await Raw.connect(server.address) for _ in range(10)]
        async with asyncio.timeout(PATIENCE_S):
            while sum(raw.closed.is_set() for raw in raws) < 7 or not all(
                raw.closed.is_set() or raw.frames for raw in raws
            ):
                await CLOCK.sleep(0.01)
        assert sum(not raw.closed.is_set() for raw in raws) == 3
        await is_well(stub)
        for raw in raws:
            await raw.close()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                late = await Raw.connect(server.address)
                while not late.frames and not late.closed.is_set():
                    await CLOCK.sleep(0.01)
                await late.close()
                if late.frames:
                    break
        await is_well(stub)


async def test_calls_of_one_connection_are_bounded_even_where_they_send_nothing() -> None:
    async with a_server(streams_max=5) as (server, stub):
        before = server.scoring.calls
        raw = await Raw.connect(server.address)
        for number in range(50):
            raw.call(2 * number + 1, SCORE)
        async with asyncio.timeout(PATIENCE_S):
            while sum(kind == RST_STREAM for kind, _, _ in raw.frames) < 45 and not raw.closed.is_set():
                await CLOCK.sleep(0.01)
        assert raw.closed.is_set() or sum(kind == RST_STREAM for kind, _, _ in raw.frames) == 45
        await is_well(stub)
        assert server.scoring.calls == before + 1
        await raw.close()


async def test_a_peer_that_answers_no_ping_loses_its_connection() -> None:
    async with a_server(silent_s=0.2, silent_answer_s=0.2) as (server, stub):
        # Greets, opens a call, and never reads or answers again what comes, as a host that froze.
        frozen = await Raw.connect(server.address)
        frozen.call(1, SCORE)
        async with asyncio.timeout(PATIENCE_S):
            await frozen.closed.wait()
        assert GOAWAY in frozen.kinds() or frozen.closed.is_set()
        await is_well(stub)
        await frozen.close()


def test_watch_streams_are_bounded_by_caller() -> None:
    watchers = Watchers(2)
    with watchers.watching("greedy"), watchers.watching("greedy"):
        with pytest.raises(OverQuota, match="has 2 watch streams open"), watchers.watching("greedy"):
            pass
        with watchers.watching("modest"):
            assert watchers.open == 3
    with watchers.watching("greedy"):
        assert watchers.open == 1
    assert watchers.open == 0
