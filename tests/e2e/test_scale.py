"""Replicas on one machine: they share the work, come and go under traffic, and none outlives its `up`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub

from lab.drills import free_base
from loanmesh.cli.mesh import CannotStart, Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.clock import SystemClock, new_request_id
from loanmesh.runtime.settings import TlsSettings
from tests.builders import an_application
from tests.databases import new_database
from tests.e2e.test_command import LOANMESH, run

CLOCK = SystemClock()
PLAIN = TlsSettings(mode="plaintext")
PATIENCE_S = 30.0


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def mesh(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    """Two of each on one database."""
    monkeypatch.setenv("INTAKE_LEASE__DURATION_S", "2")
    database = await new_database(request.getfixturevalue("postgres")) if request.param == "postgres" else ""
    two_each = dict.fromkeys(("intake", "bureau", "scoring", "pricing"), 2)
    started = Mesh(tmp_path / "state", None, free_ports(), CLOCK, print, replicas=two_each, database=database)
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


class Traffic:
    """Submits one after the other, without any retry but the channel's, and notes who accepted and what failed."""

    def __init__(self, mesh: Mesh) -> None:
        self._target = mesh.target("intake")
        self.names: list[str] = []
        self.failed: list[grpc.aio.AioRpcError] = []

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[Traffic]:
        async with open_channel(self._target, CLOCK, lambda _: 10.0, service="bureau", tls=PLAIN) as channel:
            work = [asyncio.create_task(self._submit(channel, first)) for first in range(4)]
            yield self
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _submit(self, channel: grpc.aio.Channel, first: int) -> None:
        stub = IntakeServiceStub(channel)
        for index in range(first, 1_000_000, 4):
            request = pb.SubmitApplicationRequest(
                parent="lenders/demo",
                request_id=new_request_id(),
                application=an_application("person" if index % 3 else "firm", index % 500, CLOCK.now()),
            )
            try:
                self.names.append((await stub.SubmitApplication(request)).application.name)
            except grpc.aio.AioRpcError as error:
                self.failed.append(error)
            await CLOCK.sleep(0.01)

    async def more(self, count: int) -> list[str]:
        """The next so many that are accepted."""
        start, give_up = len(self.names), CLOCK.monotonic() + PATIENCE_S
        while len(self.names) < start + count:
            assert CLOCK.monotonic() < give_up, f"{len(self.names) - start} accepted in {PATIENCE_S} s: {self.failed}"
            await CLOCK.sleep(0.02)
        return self.names[start:]


async def accepted_by(client: Client, names: list[str]) -> Counter[int]:
    """How many each process accepted; an owner is called service-pid-random."""
    histories = await asyncio.gather(*(client.history(name) for name in names))
    return Counter(int(history.events[0].actor.split("-")[1]) for history in histories)


async def still_pending(client: Client) -> list[pb.Application]:
    """Empty as soon as nothing is undecided; what is, when patience ends."""
    give_up = CLOCK.monotonic() + PATIENCE_S
    while pending := list((await client.list(filter="state = PENDING", page_size=10)).applications):
        if CLOCK.monotonic() > give_up:
            break
        await CLOCK.sleep(0.2)
    return pending


def pids(mesh: Mesh, service: str) -> set[int]:
    return {part.process.pid for part in mesh.replicas[service] if part.process}


async def test_replicas_come_and_go_under_traffic_and_no_call_fails(mesh: Mesh) -> None:
    async with Client(mesh.parts["intake"].address) as client, Traffic(mesh).flowing() as traffic:
        assert set(await accepted_by(client, await traffic.more(40))) == pids(mesh, "intake")

        await mesh.scale({"intake": 3, "bureau": 3, "scoring": 1})
        share = 0.0
        async with asyncio.timeout(PATIENCE_S):
            while share < 0.8 / 3:
                by = await accepted_by(client, await traffic.more(60))
                share = min(by[pid] for pid in pids(mesh, "intake")) / by.total()

        await mesh.scale({"intake": 1, "bureau": 1, "pricing": 1})
        assert set(await accepted_by(client, await traffic.more(40))) == pids(mesh, "intake")
        assert not traffic.failed
    async with Client(mesh.parts["intake"].address) as client:
        assert await still_pending(client) == []


async def test_what_cannot_be_scaled_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh(tmp_path / "state", None, free_ports(), CLOCK, print)
    try:
        await mesh.start()
        before = mesh.ready_line()
        with pytest.raises(ValueError, match="sandbox"):
            await mesh.scale({"sandbox": 2})
        port = int(mesh.parts["pricing"].address.rsplit(":", 1)[1])
        taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.2", port)
        with pytest.raises(CannotStart, match=r"127\.0\.0\.2"):
            await mesh.scale({"pricing": 2})
        assert mesh.ready_line() == before
        taken.close()
        await mesh.scale({"pricing": 2})
        assert [part.name for part in mesh.replicas["pricing"]] == ["pricing", "pricing-2"]
        # A replica that never gets ready does not hold up the end of the others.
        monkeypatch.setattr(mesh, "_launch_all", lambda parts: asyncio.Event().wait())
        scaling = asyncio.create_task(mesh.scale({"scoring": 2}))
        while not mesh._scaling.locked():
            await CLOCK.sleep(0.01)
    finally:
        async with asyncio.timeout(30):
            await mesh.stop()
    assert scaling.cancelled()


@pytest.fixture
def start_up(tmp_path: Path) -> Iterator[Any]:
    """Starts `loanmesh up --json` on one state; what still runs at the end is stopped."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        command = [*LOANMESH, "up", "--json", "--state", str(tmp_path / "state"), *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        return process, json.loads(line)

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def alive(ready: dict[str, Any]) -> list[int]:
    found = []
    for replicas in ready["replicas"].values():
        for one in replicas:
            try:
                os.kill(one["pid"], 0)
                found.append(one["pid"])
            except ProcessLookupError:
                continue
    return found


@pytest.mark.parametrize("database", ["", pytest.param("postgres", marks=pytest.mark.postgres)])
async def test_a_killed_up_leaves_nothing_and_the_next_goes_on(database: str, start_up: Any) -> None:
    words = ["--port-base", str(free_base()), "--replicas", "intake=2", "--database", database]
    first, ready = start_up(*words)
    assert len(alive(ready)) == 6
    async with Client(ready["targets"]["intake"]) as client:
        stored = await client.submit(an_application("person", 1, CLOCK.now()))
    first.kill()
    first.wait()
    # At once: it waits until the orphans have left, on the same ports.
    _, again = start_up(*words)
    assert not alive(ready)
    async with Client(again["targets"]["intake"]) as client:
        assert [changed async for changed in client.watch(stored.name)][-1].state == pb.Application.STATE_DECIDED


def test_scale_by_command(start_up: Any, tmp_path: Path) -> None:
    state = {"LOANMESH_STATE": str(tmp_path / "state")}
    nobody = run("scale", "intake=2", **state)
    assert nobody.returncode == 3
    assert "loanmesh up" in nobody.stderr
    _, ready = start_up("--port-base", str(free_base()))
    looked = run("scale", "--json", **state)
    assert json.loads(looked.stdout) == ready
    scaled = run("scale", "scoring=2", "pricing=2", "--json", **state)
    assert scaled.returncode == 0, scaled.stderr
    now = json.loads(scaled.stdout)
    assert [one["address"].split(":")[0] for one in now["replicas"]["scoring"]] == ["127.0.0.1", "127.0.0.2"]
    assert len(alive(now)) == 7
    assert now["parts"] == ready["parts"]
    back = run("scale", "scoring=1", **state)
    assert "scoring-2" not in back.stdout
    assert len(alive(now)) == 6
    for wrong in ("sandbox=2", "intake=0", "intake", "moon=1"):
        refused = run("scale", wrong, **state)
        assert refused.returncode == 2
        assert wrong.split("=")[0] in refused.stderr


def test_a_database_that_cannot_be_is_refused() -> None:
    refused = run("up", "--database", "mysql://x", COLUMNS="500")
    assert refused.returncode == 2
    assert "postgresql://" in refused.stderr + refused.stdout
