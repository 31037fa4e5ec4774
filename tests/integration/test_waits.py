"""A caller who asks to wait for the decision, before a real store where nothing is decided."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.duration_pb2 import Duration
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.migrations import upgrade
from services.intake.application import Snapshot
from services.intake.privacy import Privacy
from services.intake.servicer import ACKNOWLEDGE_S, IntakeServicer
from services.intake.store import Store
from services.intake.watch import Watch
from tests.builders import a_sealer, an_application
from tests.integration.intake_alone import Call, alone


class CountingStore(Store):
    """Counts reads; the first of the task `stuck` never ends."""

    reads = 0
    stuck = ""

    async def get(self, lender: str, application_id: str) -> Snapshot:
        self.reads += 1
        task = asyncio.current_task()
        if task and task.get_name() == self.stuck:
            self.stuck = ""
            await asyncio.Event().wait()
        return await super().get(lender, application_id)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CountingStore]:
    url = f"sqlite:///{tmp_path / 'test.db'}"
    await asyncio.to_thread(upgrade, url, "services.intake")
    database = await open_database(url)
    yield CountingStore(database, SystemClock(), "a", 30.0, Privacy(a_sealer()))
    await database.close()


def request(wait_s: float) -> pb.SubmitApplicationRequest:
    wait = Duration(nanos=int(wait_s * 1e9)) if wait_s < 1 else Duration(seconds=int(wait_s))
    application = an_application("person", 1, SystemClock().now())
    return pb.SubmitApplicationRequest(
        parent="lenders/demo", request_id="request-1", application=application, wait=wait
    )


async def withdraw_when_stored(store: Store, intake: IntakeServicer, count: int) -> None:
    """All of so many, as soon as they are there."""
    while len(found := (await store.page("lenders/demo", count, "", "", ""))[0]) < count:
        await SystemClock().sleep(0.001)
    for number, one in enumerate(found):
        name = f"lenders/demo/applications/{one.id}"
        withdrawal = pb.WithdrawApplicationRequest(name=name, request_id=f"withdraw-{number}")
        await intake.WithdrawApplication(withdrawal, cast(Any, Call()))


async def test_a_wait_costs_one_read_however_long_it_is(store: CountingStore) -> None:
    call = Call()
    answer = await alone(store).SubmitApplication(request(ACKNOWLEDGE_S + 0.1), cast(Any, call))
    assert answer.application.state == pb.Application.STATE_PENDING
    assert (call.acknowledged, store.reads) == (1, 1)


async def test_what_was_being_read_when_the_acknowledgement_was_due_is_read_again(store: CountingStore) -> None:
    watch = Watch(store.revisions, SystemClock(), 1.0)
    intake, call = alone(store, watch), Call()
    store.stuck = "submitting"
    submitting = asyncio.create_task(intake.SubmitApplication(request(20), cast(Any, call)), name="submitting")
    async with asyncio.timeout(10):
        await withdraw_when_stored(store, intake, 1)
        answer = await submitting
    assert answer.application.state == pb.Application.STATE_WITHDRAWN
    assert call.acknowledged == 1


def a_batch(wait_s: float, *numbers: int) -> pb.BatchSubmitApplicationsRequest:
    wait = Duration(nanos=int(wait_s * 1e9))
    batch = pb.BatchSubmitApplicationsRequest(parent="lenders/demo", wait=wait)
    for number in numbers:
        application = an_application("person", number, SystemClock().now())
        batch.requests.add(request_id=f"request-{number}", application=application)
    return batch


async def test_a_batch_that_waits_is_acknowledged_and_answered_as_it_stands(store: CountingStore) -> None:
    call = Call()
    answer = await alone(store).BatchSubmitApplications(a_batch(ACKNOWLEDGE_S + 0.1, 1, 2), cast(Any, call))
    assert [r.application.state for r in answer.results] == [pb.Application.STATE_PENDING] * 2
    assert (call.acknowledged, store.reads) == (1, 0)


async def test_a_batch_hears_of_what_becomes_of_its_items(store: CountingStore) -> None:
    watch = Watch(store.revisions, SystemClock(), 1.0)
    intake = alone(store, watch)
    waiting = asyncio.create_task(intake.BatchSubmitApplications(a_batch(0.9, 1, 2), cast(Any, Call())))
    async with asyncio.timeout(10):
        await withdraw_when_stored(store, intake, 2)
        answer = await waiting
    assert [r.application.state for r in answer.results] == [pb.Application.STATE_WITHDRAWN] * 2


async def test_what_has_its_answer_is_not_held_back_by_the_others(store: CountingStore) -> None:
    intake = alone(store)
    batch = a_batch(0.9, 1, 2)
    batch.requests[1].application.loan.amount_fen = -5
    began = SystemClock().monotonic()
    answer = await intake.BatchSubmitApplications(batch, cast(Any, Call()))
    assert SystemClock().monotonic() - began < ACKNOWLEDGE_S
    assert [r.WhichOneof("outcome") for r in answer.results] == ["application", "error"]


async def test_what_changed_elsewhere_is_told_at_the_end_of_the_wait(store: CountingStore) -> None:
    intake, watch = alone(store), Watch(store.revisions, SystemClock(), 1.0)  # It hears of nothing.
    waiting = asyncio.create_task(alone(store, watch).BatchSubmitApplications(a_batch(0.5, 1), cast(Any, Call())))
    async with asyncio.timeout(10):
        await withdraw_when_stored(store, intake, 1)
        answer = await waiting
    assert answer.results[0].application.state == pb.Application.STATE_WITHDRAWN


async def test_items_that_were_there_before_are_not_waited_for(store: CountingStore) -> None:
    intake, call = alone(store), Call()
    await intake.BatchSubmitApplications(a_batch(0.0, 1), cast(Any, call))
    async with asyncio.timeout(5):
        answer = await intake.BatchSubmitApplications(a_batch(0.9, 1, 1), cast(Any, call))
    assert {r.application.state for r in answer.results} == {pb.Application.STATE_PENDING}
    assert len({r.application.name for r in answer.results}) == 1
    assert call.acknowledged == 0
