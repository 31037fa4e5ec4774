"""Applications that can no longer be read, behind the RPCs: each is an answer to its own item, and stops no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.parking_service_pb2 import ReleaseApplicationsRequest

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import Database, Script, Statement, open_database
from loanmesh.runtime.errors import WrongState
from loanmesh.runtime.migrations import upgrade
from services.intake.parking_servicer import ParkingServicer
from services.intake.privacy import Privacy
from services.intake.servicer import IntakeServicer
from services.intake.store import Store
from tests.builders import a_sealer, an_application
from tests.integration.intake_alone import Call, alone

LENDER = "lenders/demo"


CALL = cast(Any, Call())


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    await asyncio.to_thread(upgrade, url, "services.intake")
    opened = await open_database(url)
    yield opened
    await opened.close()


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database, SystemClock(), "a", 30.0, Privacy(a_sealer()))


@pytest.fixture
def intake(store: Store) -> IntakeServicer:
    return alone(store)


def a_batch(*numbers: int) -> pb.BatchSubmitApplicationsRequest:
    now = SystemClock().now()
    return pb.BatchSubmitApplicationsRequest(
        parent=LENDER,
        requests=[
            pb.SubmitApplicationRequest(request_id=f"request-{n}", application=an_application("person", n, now))
            for n in numbers
        ],
    )


async def spoil(database: Database, name: str) -> None:
    def script() -> Script[None]:
        yield Statement("UPDATE application SET payload = data_key WHERE id = ?", [(name.split("/")[-1],)])

    await database.run(script)


async def test_one_that_cannot_be_read_fails_its_own_item_of_a_repeated_batch_alone(
    intake: IntakeServicer, database: Database
) -> None:
    batch = a_batch(1, 2)
    first = await intake.BatchSubmitApplications(batch, CALL)
    await spoil(database, first.results[0].application.name)
    again = await intake.BatchSubmitApplications(batch, CALL)
    assert again.results[0].error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert "cannot be read" in again.results[0].error.message
    assert again.results[1].application.name == first.results[1].application.name


async def test_one_that_cannot_be_read_is_parked_released_with_others_and_withdrawn(
    intake: IntakeServicer, store: Store, database: Database
) -> None:
    answer = await intake.BatchSubmitApplications(a_batch(1), CALL)
    name = answer.results[0].application.name
    await spoil(database, name)
    assert await store.claim(10) == []
    request = ReleaseApplicationsRequest(
        names=[name, f"{LENDER}/applications/none"], request_id="release-1", actor="li.na", reason="restored"
    )
    released = await ParkingServicer(store, lambda _: None).ReleaseApplications(request, CALL)
    assert [result.error.code for result in released.results] == [0, grpc.StatusCode.NOT_FOUND.value[0]]
    withdrawn = await intake.WithdrawApplication(
        pb.WithdrawApplicationRequest(name=name, request_id="withdraw-1"), CALL
    )
    assert withdrawn.application.state == pb.Application.STATE_WITHDRAWN
    with pytest.raises(WrongState, match="cannot be read"):
        await intake.GetApplication(pb.GetApplicationRequest(name=name), CALL)
