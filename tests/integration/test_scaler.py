"""The scaler over the wire, as KEDA calls it: statuses, details, and counts from a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import pytest
from externalscaler import externalscaler_pb2 as pb
from externalscaler.externalscaler_pb2_grpc import ExternalScalerStub, add_ExternalScalerServicer_to_server
from google.rpc import error_details_pb2, status_pb2

from loanmesh.runtime.clock import SystemClock, new_uuid7
from loanmesh.runtime.database import open_database
from loanmesh.runtime.migrations import upgrade
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import ServerSettings
from services.intake.application import New
from services.intake.estimate import Estimate
from services.intake.privacy import Privacy
from services.intake.scaler import WINDOW_S, Scaler
from services.intake.scaler_servicer import METRIC, ScalerServicer
from services.intake.settings import ScalerSettings
from services.intake.store import Store
from tests.builders import a_sealer

if TYPE_CHECKING:
    from externalscaler.externalscaler_pb2_grpc import ExternalScalerAsyncStub

CLOCK = SystemClock()


@asynccontextmanager
async def scaler_on(url: str) -> AsyncIterator[tuple[Store, ExternalScalerAsyncStub]]:
    """A store with a scaler served from it."""
    await asyncio.to_thread(upgrade, url, "services.intake")
    database = await open_database(url)
    store = Store(database, CLOCK, "owner", 30.0, Privacy(a_sealer()))
    scaler = Scaler(Estimate(store.backlog, CLOCK), store.arrived, ScalerSettings(), CLOCK)
    server = make_server(ServerSettings(), CLOCK)
    add_ExternalScalerServicer_to_server(ScalerServicer(scaler, CLOCK, 4), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield store, ExternalScalerStub(channel)
    await server.stop(0)
    await database.close()


def asked(**metadata: str) -> pb.ScaledObjectRef:
    return pb.ScaledObjectRef(name="bureau", namespace="loanmesh", scalerMetadata=metadata)


async def accept(store: Store, count: int) -> None:
    now_s = CLOCK.now().timestamp()
    new = [
        New(new_uuid7(CLOCK), "lenders/demo", "c", f"request-{n}", b"payload", "hash", 1, "app", now_s)
        for n in range(count)
    ]
    await store.accept([(one, False) for one in new])


async def test_what_came_and_waits_is_told_in_replicas(database_url: str) -> None:
    async with scaler_on(database_url) as (store, stub):
        await accept(store, 70)
        asked_for = asked(service="bureau", ratePerReplica="1", drainSeconds="10", utilisation="0.7")
        answer = await stub.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=asked_for, metricName=METRIC))
        # 70 in ten seconds, of which none is decided: 7 a second, and 7 a second more to be done in ten seconds.
        assert answer.metricValues[0].metricValueFloat == pytest.approx(14)
        assert (await stub.IsActive(asked_for)).result is True


async def test_only_what_came_lately_is_counted_and_no_further_than_asked(database_url: str) -> None:
    async with scaler_on(database_url) as (store, _):
        await accept(store, 30)
        now_s = CLOCK.now().timestamp()
        assert await store.arrived(now_s - WINDOW_S, 1000) == 30
        assert await store.arrived(now_s - WINDOW_S, 10) == 10
        assert await store.arrived(now_s + 3600, 1000) == 0


async def test_a_wrong_trigger_is_answered_with_the_key_and_the_rule(database_url: str) -> None:
    async with scaler_on(database_url) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError, match="it must be one of intake") as refused:
            await stub.GetMetricSpec(asked(service="beaureau"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        details = dict(refused.value.trailing_metadata() or ())["grpc-status-details-bin"]
        bad = error_details_pb2.BadRequest()
        assert any(detail.Unpack(bad) for detail in status_pb2.Status.FromString(details).details)
        assert [violation.field for violation in bad.field_violations] == ["scalerMetadata.service"]


async def test_a_stream_is_open_while_keda_listens(database_url: str) -> None:
    async with scaler_on(database_url) as (_, stub):
        stream = stub.StreamIsActive(asked(service="bureau"))
        async for said in stream:
            assert said.result is False
            stream.cancel()
            break
