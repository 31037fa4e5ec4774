"""The whole mesh in real processes: asked twice, asked wrongly, killed and starved, it decides each once."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections import Counter
from pathlib import Path

import grpc
import pytest
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from lending.type.v1.party_pb2 import Consent

from lab.population import Kind
from loanmesh.cli.mesh import START_ORDER, Mesh, free_ports
from loanmesh.client import CallFailed, Client
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application
from tests.e2e.conftest import set_fault

CLOCK = SystemClock()
BEGAN = CLOCK.now()


def fresh(kind: Kind, index: int) -> pb.Application:
    """As of one moment for all tests: consents tell the minute, and one sent again must be the same."""
    return an_application(kind, index, BEGAN)


async def decide_all(client: Client, jobs: list[tuple[str, pb.Application]]) -> dict[str, pb.Application]:
    """Submit all and follow each to its end; request_id -> application."""

    async def one(key: str, application: pb.Application) -> tuple[str, pb.Application]:
        stored = await client.submit(application, request_id=key)
        changes = [changed async for changed in client.watch(stored.name)]
        return key, changes[-1]

    return dict(await asyncio.gather(*(one(key, application) for key, application in jobs)))


def some_jobs(count: int, first: int = 0) -> list[tuple[str, pb.Application]]:
    kinds: tuple[Kind, Kind] = ("person", "firm")
    return [(str(uuid.uuid5(uuid.NAMESPACE_OID, f"{first + i}")), fresh(kinds[i % 2], first + i)) for i in range(count)]


async def decided_events(client: Client, name: str) -> int:
    history = await client.history(name)
    assert history.chain_intact
    return sum(event.kind == "decided" for event in history.events)


async def test_every_change_may_be_sent_twice(mesh: Mesh, client: Client) -> None:
    jobs = some_jobs(60)
    first = await decide_all(client, jobs)
    assert len({pb.Decision.Outcome.Name(a.decision.outcome) for a in first.values()}) == 3
    assert await decide_all(client, jobs) == first
    batch = await client.submit_batch(jobs)
    assert [a.name for a in batch if isinstance(a, pb.Application)] == [first[key].name for key, _ in jobs]

    offered = next(a for a in first.values() if a.decision.offers)
    accepted = [await client.accept(offered.name, "offer-1", request_id="accept-0001") for _ in range(2)]
    assert accepted[0] == accepted[1]
    assert accepted[0].state == pb.Application.STATE_OFFER_ACCEPTED
    declined = next(a for a in first.values() if not a.decision.offers)
    withdrawn = [await client.withdraw(declined.name, request_id="withdraw-01") for _ in range(2)]
    assert withdrawn[0] == withdrawn[1]

    answer = await client.explain(offered.name, schedules=True)
    assert all(reason.text_zh and reason.text_en for reason in answer.decision.reasons)
    rows = answer.schedules[0].instalments
    assert (rows[-1].balance_fen, sum(r.principal_fen for r in rows)) == (0, answer.decision.offers[0].principal_fen)
    parts = answer.decision.offers[0].rate_components
    assert sum(part.rate_ppm for part in parts) == answer.decision.offers[0].apr_ppm

    page = await client.list(filter="outcome = DECLINED", page_size=3)
    assert page.next_page_token
    more = await client.list(filter="outcome = DECLINED", page_size=3, page_token=page.next_page_token)
    assert not {a.name for a in page.applications} & {a.name for a in more.applications}


async def test_bad_input_is_named_and_harms_nothing(mesh: Mesh, client: Client) -> None:
    sound = await client.submit(fresh("person", 1), request_id="request-1")

    async def refused(code: str, *words: str, work) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(CallFailed) as failed:
            await work
        said = f"{failed.value} {failed.value.violations}"
        assert failed.value.code == code
        assert all(word in said for word in words), said

    wrong = fresh("person", 2)
    wrong.loan.amount_fen = -5
    wrong.channel = "NOT OK"
    await refused("INVALID_ARGUMENT", "application.loan.amount_fen", "application.channel", work=client.submit(wrong))
    twisted = fresh("person", 2)
    twisted.parties[0].identity.value = "990000199001010000"
    await refused("INVALID_ARGUMENT", "parties[0].identity.value", "check character", work=client.submit(twisted))
    late = fresh("person", 2)
    late.consents[0].given_time.seconds = 10**15
    await refused("INVALID_ARGUMENT", "consents[0].given_time", work=client.submit(late))
    await refused("INVALID_ARGUMENT", "request_id", work=client.submit(fresh("person", 2), request_id="x"))
    other = fresh("person", 3)
    await refused("ALREADY_EXISTS", sound.name, "loan.amount_fen", work=client.submit(other, request_id="request-1"))
    nobody = f"lenders/demo/applications/{uuid.UUID(int=1)}"
    await refused("NOT_FOUND", nobody, work=client.get(nobody))
    await refused("INVALID_ARGUMENT", "name", work=client.get("applications/1"))
    await refused("INVALID_ARGUMENT", "filter", "colour", work=client.list(filter="colour = red"))
    await refused("INVALID_ARGUMENT", "page_token", work=client.list(page_token="x"))
    await refused("NOT_FOUND", "offer-9", work=_accept_when_decided(client, sound.name, "offer-9"))
    await client.withdraw(sound.name)
    await refused("FAILED_PRECONDITION", "WITHDRAWN", work=client.accept(sound.name, "offer-1"))
    assert await decided_events(client, sound.name) == 1

    results = await client.submit_batch(
        [("request-1", fresh("person", 1)), ("batch-0002", wrong), ("batch-0003", fresh("firm", 1))]
    )
    assert [type(r).__name__ for r in results] == ["Application", "Status", "Application"]


async def _accept_when_decided(client: Client, name: str, offer: str) -> None:
    assert [changed async for changed in client.watch(name)]
    await client.accept(name, offer)


async def test_a_missing_consent_is_asked_for_and_supplied(mesh: Mesh, client: Client) -> None:
    application = fresh("firm", 4)
    tax = next(c for c in application.consents if c.source == "tax")
    kept = Consent()
    kept.CopyFrom(tax)
    application.consents.remove(tax)
    stored = await client.submit(application)
    async for changed in client.watch(stored.name):
        stored = changed
        if stored.state == pb.Application.STATE_AWAITING_INFORMATION:
            break
    assert [(m.field, m.source) for m in stored.missing_information] == [("consents", "tax")]
    assert stored.HasField("due_time")
    supply = pb.SupplyInformationRequest(name=stored.name, request_id="supply-001", consents=[kept])
    assert (await client.supply(supply)).state != pb.Application.STATE_AWAITING_INFORMATION
    await client.supply(supply)
    changes = [changed async for changed in client.watch(stored.name)]
    assert changes[-1].state == pb.Application.STATE_DECIDED


async def test_two_dead_sources_fail_nothing_and_decline_nothing(mesh: Mesh, client: Client) -> None:
    await set_fault(mesh, "court", dead=True)
    await set_fault(mesh, "bank_flow", hang=True)
    jobs = some_jobs(int(os.environ.get("LOANMESH_PROOF_APPLICATIONS", "200")))
    stored = await asyncio.gather(*(client.submit(a, request_id=key, wait_s=1.0) for key, a in jobs))
    assert {a.state for a in stored} == {pb.Application.STATE_PENDING}
    await set_fault(mesh, "court", dead=False)  # Court is back, bank flow still hangs: approvals yes, declines no.
    while len((await client.list(filter="state = DECIDED", page_size=200)).applications) < 40:
        await CLOCK.sleep(0.1)
    assert not (await client.list(filter="outcome = DECLINED")).applications
    await set_fault(mesh, "bank_flow", hang=False)
    ended = await decide_all(client, jobs)
    outcomes = Counter(a.decision.outcome for a in ended.values())
    assert outcomes[pb.Decision.OUTCOME_DECLINED] > 0
    for application in ended.values():
        answer = await client.explain(application.name)
        states = {r.source: r.state for r in answer.profile.reports}
        if application.decision.outcome == pb.Decision.OUTCOME_DECLINED:
            assert set(states.values()) <= {SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND}
        elif states["bank_flow"] == SourceReport.STATE_MISSING:
            assert "without_bank_flow" in application.decision.degradations


async def test_killing_each_service_in_the_middle_loses_nothing(mesh: Mesh, client: Client) -> None:
    await set_fault(mesh, "*", latency_ms=60)
    jobs = some_jobs(240)
    work = asyncio.create_task(decide_all(client, jobs))
    for name in START_ORDER:
        before = mesh.parts[name].restarts
        mesh.kill(name)
        while mesh.parts[name].restarts == before or not _alive(mesh, name):
            await CLOCK.sleep(0.05)
    ended = await work
    assert {a.state for a in ended.values()} == {pb.Application.STATE_DECIDED}
    assert len({a.name for a in ended.values()}) == len(jobs)
    assert {await decided_events(client, a.name) for a in ended.values()} == {1}


def _alive(mesh: Mesh, name: str) -> bool:
    process = mesh.parts[name].process
    return process is not None and process.returncode is None


async def test_a_second_start_goes_on_where_the_first_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE_LEASE__DURATION_S", "2")
    state, ports = tmp_path / "state", free_ports()
    first = Mesh(state, None, ports, CLOCK, print)
    await first.start()
    await set_fault(first, "*", latency_ms=800)
    jobs = some_jobs(80)
    async with Client(first.parts["intake"].address) as client:
        stored = await client.submit_batch(jobs)
    for name in START_ORDER:
        first.kill(name)
    await first.stop()

    second = Mesh(state, None, ports, CLOCK, print)
    try:
        await second.start()
        async with Client(second.parts["intake"].address) as client:
            ended = await decide_all(client, jobs)
            assert [a.name for a in stored if isinstance(a, pb.Application)] == [ended[key].name for key, _ in jobs]
            assert {await decided_events(client, a.name) for a in ended.values()} == {1}
    finally:
        await second.stop()


async def test_a_cancelled_caller_frees_its_handler_and_health_is_told(mesh: Mesh) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(mesh.parts["intake"].address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="lending.intake.v1.IntakeService"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        call = IntakeServiceStub(channel).GetApplication(pb.GetApplicationRequest(name="x"))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
