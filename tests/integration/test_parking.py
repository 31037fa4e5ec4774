"""Parked: pending for its caller, nobody's work, an SRE's to see and to set going again. On both databases."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import add_IntakeServiceServicer_to_server
from lending.intake.v1.parking_service_pb2_grpc import add_ParkingServiceServicer_to_server
from typer.testing import CliRunner, Result

from lab.history import Recorder
from lab.judge import check
from loanmesh.cli.main import app
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import Database, open_database
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.migrations import downgrade, upgrade
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import ServerSettings
from services.intake.application import Claim, State, chain
from services.intake.parking_servicer import ParkingServicer
from services.intake.ports import Broken, Deferred, Parked
from services.intake.privacy import Privacy
from services.intake.servicer import IntakeServicer
from services.intake.store import Store
from tests.builders import a_sealer
from tests.integration.test_store import CLOCK, LENDER, accepted, decided, new

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
DUE_AT = 4e9


def a_store(database: Database) -> Store:
    return Store(database, CLOCK, "a", 30.0, Privacy(a_sealer()))


def uuid(number: int) -> str:
    return f"01a20b7e-4166-799b-be1e-{number:012d}"


def parked(claim: Claim, cause: str = "scoring_error") -> Parked:
    traced = replace(claim, traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-01")
    return Parked(traced, "score", Broken(cause, "KeyError"), DUE_AT, 1.0)


async def some_parked(store: Store, *numbers: int, cause: str = "scoring_error") -> None:
    stored = await store.accept([(replace(new(n), id=uuid(n)), True) for n in numbers])
    await store.settle([parked(one.claim, cause) for one in stored if one.claim])


async def release(store: Store, application_id: str, request_id: str = "release-1") -> str:
    servicer = ParkingServicer(store, lambda ids: None)
    from lending.intake.v1.parking_service_pb2 import ReleaseApplicationsRequest

    request = ReleaseApplicationsRequest(
        names=[f"{LENDER}/applications/{application_id}"], request_id=request_id, actor="li.na", reason="mended"
    )
    message: str = (await servicer.ReleaseApplications(request, None)).results[0].error.message
    return message


async def test_attempts_that_broke_a_stage_are_counted_and_others_are_not(database: Database) -> None:
    store = a_store(database)
    await accepted(store, 1)
    (claim,) = await accepted(store, 2)
    for broke, faults in ((True, 1), (False, 1), (True, 2)):
        await store.settle([Deferred(claim, ("x",), -1.0, 1.0, broke=broke)])
        (claim,) = await store.claim(5)
        assert claim.faults == faults


async def test_what_is_parked_is_pending_for_its_caller_and_nobodys_work(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    assert await store.settle([parked(claim)]) == {"id-1"}
    snapshot = await store.get(LENDER, "id-1")
    assert (snapshot.state.shown, snapshot.waiting_for, snapshot.due_at) == (State.PENDING, ("parked",), DUE_AT)
    assert await store.claim(10) == []
    assert await store.renew([claim]) == set()
    assert await store.settle([decided(claim)]) == set()
    assert await store.backlog() == []
    assert await store.expire_overdue() == 0
    (listed,), _ = await store.page(LENDER, 10, "", "state = PENDING", "")
    assert listed.id == "id-1"
    assert await store.page(LENDER, 10, "", "state != PENDING", "") == ([], "")
    with pytest.raises(InvalidRequest):
        await store.page(LENDER, 10, "", "state = PARKED", "")


async def test_only_who_holds_the_lease_parks(database: Database) -> None:
    slow, fast = Store(database, CLOCK, "slow", -1.0, Privacy(a_sealer())), a_store(database)
    (stale,) = await accepted(slow, 1)
    await fast.claim(1)
    assert await slow.settle([parked(stale)]) == set()
    assert await fast.parked(10, "", "") == ([], "")


async def test_a_release_begins_anew_and_tells_by_whom_and_why(database: Database) -> None:
    store = a_store(database)
    await some_parked(store, 1)
    assert await release(store, uuid(1)) == ""
    assert await release(store, uuid(1)) == ""
    (claim,) = await store.claim(10)
    assert (claim.faults, claim.waiting_for) == (0, "[]")
    assert (await store.get(LENDER, uuid(1))).due_at is None
    told = await store.events(LENDER, uuid(1))
    assert [event.kind for event in told] == ["accepted", "parked", "released"]
    assert told[1].details == {
        "cause": "scoring_error", "stage": "score", "error_type": "KeyError", "faults": "1", "trace_id": TRACE_ID
    }  # fmt: skip
    assert told[2].details == {"actor": "li.na", "reason": "mended"}
    before = ""
    for event in told:
        bare = type(event)(event.seq, event.kind, event.at, event.actor, event.details)
        assert event.hash == chain(before, uuid(1), bare)
        before = event.hash
    assert await store.settle([decided(claim)]) == {uuid(1)}


async def test_only_what_is_parked_is_released(database: Database) -> None:
    store = a_store(database)
    await store.accept([(replace(new(1), id=uuid(1)), False)])
    assert "it is PENDING, not PARKED" in await release(store, uuid(1))
    assert "there is no" in await release(store, uuid(2))


async def test_a_parked_application_can_be_withdrawn(database: Database) -> None:
    store = a_store(database)
    await some_parked(store, 1)
    await store.change(LENDER, uuid(1), "w-1", {}, "withdrawn", {}, lambda *_: {"state": "WITHDRAWN", "due_at": None})
    snapshot = await store.get(LENDER, uuid(1))
    assert (snapshot.state, snapshot.waiting_for) == (State.WITHDRAWN, ())
    assert await store.parked(10, "", "") == ([], "")


async def test_pages_of_a_cause_hold_each_once(database: Database) -> None:
    store = a_store(database)
    await some_parked(store, *range(1200))
    await some_parked(store, *range(1200, 1230), cause="pricing_error")
    found, token = [], ""
    while True:
        page, token = await store.parked(7, token, "pricing_error")
        found += [view.id for view in page]
        if not token:
            break
    assert found == [uuid(number) for number in range(1200, 1230)]
    with pytest.raises(InvalidRequest):
        await store.parked(7, "x", "")


async def test_a_release_before_knows_what_was_parked_as_pending(database_url: str) -> None:
    await asyncio.to_thread(upgrade, database_url, "services.intake")
    opened = await open_database(database_url)
    await some_parked(a_store(opened), 1)
    await opened.close()
    await asyncio.to_thread(downgrade, database_url, "services.intake", "0002")
    opened = await open_database(database_url)
    assert await opened.read("SELECT state, waiting_for FROM application") == [("PENDING", "[]")]
    await opened.close()


# --- By command ---


@pytest.fixture
async def intake(tmp_path: Path) -> AsyncIterator[tuple[Store, str]]:
    """A real server before a real store: the parking RPCs, and intake's reads."""
    url = f"sqlite:///{tmp_path / 'test.db'}"
    await asyncio.to_thread(upgrade, url, "services.intake")
    database = await open_database(url)
    store, clock = a_store(database), SystemClock()
    server = make_server(ServerSettings(), clock)
    nobody = cast(Any, None)
    reads = IntakeServicer(
        store, nobody, nobody, nobody, nobody, nobody, {}, clock, lambda: "", accepts_waiting_max=1, admission=nobody
    )
    add_IntakeServiceServicer_to_server(reads, server)
    add_ParkingServiceServicer_to_server(ParkingServicer(store, lambda ids: None), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield store, address
    await server.stop(0)
    await database.close()


async def command(address: str, *words: str) -> Result:
    environment = {"LOANMESH_ADDRESS": address, "LOANMESH_ACTOR": "li.na", "COLUMNS": "250"}
    return await asyncio.to_thread(CliRunner().invoke, app, ["parked", *words], env=environment)


async def test_an_sre_lists_shows_and_releases(intake: tuple[Store, str]) -> None:
    store, address = intake
    nothing = await command(address, "list")
    assert (nothing.exit_code, "nothing is parked" in nothing.output) == (0, True)
    await some_parked(store, 1, 2)
    await some_parked(store, 3, cause="pricing_error")

    listed = await command(address, "list", "--json")
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [row["cause"] for row in rows] == ["scoring_error", "scoring_error", "pricing_error"]
    assert rows[0]["traceId"] == TRACE_ID
    shown = await command(address, "show", uuid(1))
    assert shown.exit_code == 0, shown.output
    for word in ("KeyError", TRACE_ID, "accepted", "parked", "next:"):
        assert word in shown.output
    assert "release --all --cause scoring_error" in (await command(address, "list")).output

    released = await command(address, "release", "--all", "--cause", "scoring_error", "--reason", "rolled back")
    assert released.exit_code == 0, released.output
    assert "released 2 of 2" in released.output
    assert released.stdout.splitlines()[-1].startswith("next: ")
    assert {claim.id for claim in await store.claim(10)} == {uuid(1), uuid(2)}
    again = await command(address, "release", f"{LENDER}/applications/{uuid(1)}", "--reason", "again")
    assert (again.exit_code, "not PARKED" in again.output) == (4, True)
    gone = await command(address, "show", uuid(1))
    assert (gone.exit_code, "is not parked" in gone.output) == (4, True)


async def test_wrong_usage_and_nobody_there_are_said_plainly() -> None:
    for words in (["release"], ["release", "--all"], ["release", "x", "--all", "--reason", "r"],
                  ["release", "x", "--cause", "c", "--reason", "r"]):  # fmt: skip
        assert (await command("127.0.0.1:1", *words)).exit_code == 2
    away = await command("127.0.0.1:1", "list")
    assert (away.exit_code, "not reachable" in away.output) == (3, True)


async def test_the_history_checker_takes_a_parked_one_for_the_sres(intake: tuple[Store, str]) -> None:
    store, _ = intake
    await some_parked(store, 1)
    application = pb.Application(
        name=f"{LENDER}/applications/{uuid(1)}", state=pb.Application.STATE_PENDING, revision=2
    )
    application.waiting_for.append("parked")
    application.due_time.FromSeconds(2_000_000_000)
    recorder = Recorder(lambda: 1.0)
    recorder.submitted("shop", "request-1")
    recorder.acknowledged("shop", "request-1", application)
    recorder.standing(application)
    assert check(recorder.records) == []
    application.ClearField("due_time")
    recorder.standing(application)
    assert [violation.rule for violation in check(recorder.records)] == ["parked_rests"]
