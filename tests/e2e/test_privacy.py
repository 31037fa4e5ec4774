"""A full mesh with planted identities: they come out nowhere but where they belong, and are forgotten when asked."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from lending.type.v1.party_pb2 import Party

from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import CallFailed, Client
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application
from tests.databases import new_database
from tests.e2e.conftest import set_fault

CLOCK = SystemClock()
NAME = "欧阳测试娜"
PHONE = "13900001234"
LENDER = "lenders/demo"
SERVICES = ("INTAKE", "BUREAU", "SCORING", "PRICING")


class TakesAll(grpc.GenericRpcHandler):
    """A collector that keeps every byte it is sent."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def take(request: bytes, context: Any) -> bytes:
            self.taken.append(request)
            return b""

        return grpc.unary_unary_rpc_method_handler(take)


@pytest.fixture
async def collected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[list[bytes]]:
    """What the services of a mesh started now export, all of it."""
    handler = TakesAll()
    server = grpc.aio.server(handlers=(handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for service in SERVICES:
        monkeypatch.setenv(f"{service}_TELEMETRY__OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv(f"{service}_TELEMETRY__SAMPLE_RATIO", "1")
        monkeypatch.setenv(f"{service}_TELEMETRY__LOG_LEVEL", "debug")
    monkeypatch.setenv("LOANMESH_PROFILE", str(tmp_path / "profiles"))
    yield handler.taken
    await server.stop(0)


def planted(kind: Any, index: int) -> pb.Application:
    """An application with a name and a telephone number where they may stand."""
    made = an_application(kind, index, CLOCK.now())
    made.parties[0].legal_name = NAME
    made.device.platform = PHONE
    return made


def guarantor(index: int) -> Party:
    party = planted("person", index).parties[0]
    party.role = Party.ROLE_GUARANTOR
    return party


def malformed() -> Iterator[pb.SubmitApplicationRequest]:
    """Requests with personal data in the wrong fields."""
    number = number_of("person", 1)

    def request() -> pb.SubmitApplicationRequest:
        return pb.SubmitApplicationRequest(
            parent=LENDER, request_id="wrong-request-1", application=planted("person", 1)
        )

    wrong = request()
    wrong.application.channel = number
    yield wrong
    wrong = request()
    wrong.request_id = f"{NAME} {number}"
    yield wrong
    wrong = request()
    wrong.application.loan.product = PHONE
    yield wrong
    wrong = request()
    wrong.application.consents[0].source = NAME
    yield wrong
    wrong = request()
    wrong.application.parties[0].identity.value = f"{number}{NAME}"
    yield wrong
    wrong = request()
    wrong.application.parties[0].identity.value = number[:-1] + ("0" if number[-1] != "0" else "1")
    yield wrong
    wrong = request()
    wrong.parent = number
    yield wrong


def number_of(kind: Any, index: int) -> str:
    return an_application(kind, index).parties[0].identity.value


async def refusals(address: str) -> list[str]:
    """What callers were told, details included."""
    told = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub = IntakeServiceStub(channel)
        for request in malformed():
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.SubmitApplication(request, timeout=10)
            told.append(f"{refused.value.details()} {refused.value.trailing_metadata()}")
        raw: Any = channel.unary_unary("/lending.intake.v1.IntakeService/SubmitApplication")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await raw(b"\xff" + planted("person", 1).SerializeToString(), timeout=10)
        told.append(f"{refused.value.details()} {refused.value.trailing_metadata()}")
        for filter_ in (f"state = {number_of('person', 1)}", f"{NAME} = 1", f"create_time > {PHONE}"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ListApplications(pb.ListApplicationsRequest(parent=LENDER, filter=filter_), timeout=10)
            told.append(f"{refused.value.details()} {refused.value.trailing_metadata()}")
    return told


async def loanmesh(*words: str, said: str = "") -> str:
    """Everything a command says, on both streams."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loanmesh", *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate(said.encode())
    return out.decode()


async def rows_of(mesh: Mesh) -> str:
    """Every column of every table, where the database is PostgreSQL."""
    shown = ""
    for service in SERVICES[:2]:
        url = os.environ.get(f"{service}_DATABASE_URL", "")
        if url.startswith("postgresql"):
            connection = await asyncpg.connect(url)
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in tables:
                for row in await connection.fetch(f'SELECT * FROM "{table}"'):
                    shown += " ".join(v.decode("latin-1") if isinstance(v, bytes) else str(v) for v in row)
            await connection.close()
    return shown


class Stoppable(Mesh):
    """A mesh that may be stopped before its fixture ends."""

    stopped = False

    async def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            await super().stop()


@pytest.fixture
async def mesh(
    request: pytest.FixtureRequest, collected: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Mesh]:
    """Whose telemetry is collected, on either kind of database."""
    monkeypatch.setenv("INTAKE_LEASE__DURATION_S", "2")
    if request.param == "postgres":
        server: str = request.getfixturevalue("postgres")
        for service in SERVICES[:2]:
            monkeypatch.setenv(f"{service}_DATABASE_URL", await new_database(server))
    started = Stoppable(tmp_path / "state", None, free_ports(), CLOCK, print)
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


@pytest.mark.parametrize("mesh", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
async def test_planted_identities_come_out_nowhere_and_are_forgotten(
    collected: list[bytes], mesh: Mesh, client: Client, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state, address = tmp_path / "state", mesh.parts["intake"].address
    # A decline, an approval, a firm, one that waits for a dead source, many at once with a journal, and a crash.
    applications = [planted("person", 1), planted("person", 3), planted("firm", 3)]
    applications[1].parties.append(guarantor(9))
    decided = [await client.submit(one, wait_s=20) for one in applications]
    assert {one.state for one in decided} == {pb.Application.STATE_DECIDED}
    await set_fault(mesh, "central_bank", dead=True)
    waiting = await client.submit(planted("person", 5), wait_s=1)
    assert waiting.state == pb.Application.STATE_PENDING
    async for result in client.submit_many([planted("person", 6), planted("firm", 7)], resume=tmp_path / "journal"):
        assert getattr(result, "application", None)
    mesh.kill("intake")
    await set_fault(mesh, "central_bank", dead=False)
    seen = [one.state async for one in client.watch(waiting.name)]
    assert seen[-1] == pb.Application.STATE_DECIDED
    told = await refusals(address)
    with pytest.raises(CallFailed) as foreign:
        await client.get(decided[0].name.replace("lenders/demo", "lenders/other"))
    told.append(str(foreign.value))

    secrets = [key["secret"] for file in state.glob("*-keys.json") for keys in _json(file).values() for key in keys]
    said = [
        await loanmesh("status", "--address", address, "--json"),
        await loanmesh("deps", "--address", address),
        await loanmesh("history", decided[0].name, "--address", address, "--json"),
        await loanmesh("keys", "show", str(state / "intake-keys.json"), "--json"),
        await loanmesh("settings", "intake", "--json"),
    ]
    said += [arguments(part.process.pid) for parts in mesh.replicas.values() for part in parts if part.process]

    # Who asks is forgotten; the number comes from standard input.
    erase = ("erase", "--lender", LENDER, "--subject-file", "-", "--actor", "dpo", "--address", address, "--json")
    erased = await loanmesh(*erase, said=number_of("person", 3))
    kept = await loanmesh(*erase, "--dry-run", said=number_of("firm", 3))
    said += [erased, kept]
    outcomes = {one["name"]: one["outcome"] for one in json.loads(erased)["applications"]}
    assert set(outcomes) == {decided[1].name}
    gone = await client.get(decided[1].name)
    if outcomes[decided[1].name] == "OUTCOME_ERASED":
        assert not gone.parties
        with pytest.raises(CallFailed) as explained:
            await client.explain(decided[1].name)
        assert (explained.value.code, "was erased on" in str(explained.value)) == ("FAILED_PRECONDITION", True)
    assert (await client.history(decided[1].name)).chain_intact

    await mesh.stop()  # Spans and metrics are sent, profiles and logs written, when processes end.
    out, err = capfd.readouterr()
    everything = files_in(tmp_path)
    everything |= {"stdout": out.encode(), "stderr": err.encode(), "telemetry": b"".join(collected)}
    everything |= {f"told {n}": text.encode() for n, text in enumerate(told)}
    everything |= {f"said {n}": text.encode() for n, text in enumerate(said)}
    everything["postgres"] = (await rows_of(mesh)).encode()
    looked_for = [NAME, NAME.encode("unicode_escape").decode(), json.dumps(NAME)[1:-1], PHONE]
    looked_for += [number_of("person", n) for n in (1, 3, 5, 6, 9)] + [number_of("firm", n) for n in (3, 7)]
    assert collected, "telemetry was received"
    assert [(where, what) for where, text in everything.items() for what in looked_for if what.encode() in text] == []
    open_keys = [where for where, text in everything.items() if any(secret.encode() in text for secret in secrets)]
    assert sorted(Path(where).name for where in open_keys) == ["bureau-keys.json", "intake-keys.json"]


def arguments(pid: int) -> str:
    """What everybody on the machine sees of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _json(file: Path) -> Any:
    return json.loads(file.read_text())
