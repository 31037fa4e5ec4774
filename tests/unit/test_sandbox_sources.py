"""The sandbox over a real socket, asked by bureau's own wire: it answers, fails as told, and leaves when told."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from lab.identity import credit_code, real_firm_code
from lab.population import SOURCES, Kind, Population
from lab.sandbox import Quota, Sandbox
from loanmesh.runtime.clock import FakeClock, SystemClock
from services.bureau.gather import Subject
from services.bureau.profile import Answer
from services.bureau.sources import load_sources
from services.bureau.wire import HttpWire

POPULATION = Population(seed=1)
DATA = Path(os.environ.get("LOANMESH_DATA", "../shared/data"))


class Running:
    """A sandbox that listens, and a wire to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.wire = HttpWire(url, SystemClock(), 0.5, random.Random(1))
        self.session = aiohttp.ClientSession()

    async def ask(self, source: str, kind: Kind = "firm", index: int = 1) -> Answer | str:
        return await self.ask_for(source, kind, POPULATION.subject(kind, index).identity)

    async def ask_for(self, source: str, kind: Kind, number: str) -> Answer | str:
        identity_kind = "resident_id" if kind == "person" else "unified_social_credit_code"
        return await self.wire.ask(load_sources()[source], Subject(kind, identity_kind, number))

    async def control(self, name: str, **change: Any) -> tuple[int, Any]:
        method, body = ("POST", change) if change else ("GET", None)
        async with self.session.request(method, f"{self.url}/control/{name}", json=body) as answer:
            return answer.status, await answer.json() if answer.status == 200 else await answer.text()


async def start(state: Path) -> tuple[Running, web.AppRunner]:
    sandbox = Sandbox(POPULATION, state, SystemClock(), random.Random(1))
    runner = web.AppRunner(sandbox.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return Running(f"http://127.0.0.1:{runner.addresses[0][1]}"), runner


@pytest.fixture
async def sandbox(tmp_path: Path) -> AsyncIterator[Running]:
    running, runner = await start(tmp_path)
    yield running
    await running.wire.close()
    await running.session.close()
    await runner.cleanup()


@pytest.mark.parametrize("kind", ["person", "firm"])
async def test_all_sources_state_the_subjects_facts(sandbox: Running, kind: Kind) -> None:
    index = next(i for i in range(100) if POPULATION.subject(kind, i).registered)
    stated: dict[str, Any] = {}
    for source in SOURCES:
        said = await sandbox.ask(source, kind, index)
        assert isinstance(said, Answer)
        stated |= said.facts
    facts = POPULATION.subject(kind, index).facts
    assert stated == {n: f for n, f in facts.items() if not n.startswith(("declared.", "age_")) and f is not None}
    _, stats = await sandbox.control("stats")
    assert stats == {f"{source}:answered": 1 for source in SOURCES}


async def test_who_is_not_registered_is_not_found(sandbox: Running) -> None:
    index = next(i for i in range(100) if not POPULATION.subject("firm", i).registered)
    for said in (await sandbox.ask("central_bank", "firm", index), await sandbox.ask_for("tax", "firm", "9" * 18)):
        assert isinstance(said, Answer)
        assert not said.found


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ({"dead": True}, "unavailable"),
        ({"hang": True}, "timeout"),
        ({"garbage": True}, "garbage"),
        ({"error_rate": 1}, "unavailable"),
        ({"latency_ms": 2000}, "timeout"),
    ],
)
async def test_a_fault_hits_its_source_only_and_ends_when_taken_back(
    sandbox: Running, fault: dict[str, Any], word: str
) -> None:
    before = (await sandbox.control("faults"))[1]["court"]
    assert (await sandbox.control("faults", source="court", **fault))[0] == 200
    assert await sandbox.ask("court") == word
    assert isinstance(await sandbox.ask("tax"), Answer)
    await sandbox.control("faults", source="*", **before)
    assert isinstance(await sandbox.ask("court"), Answer)


async def test_a_source_over_its_quota_says_so_and_the_others_answer(sandbox: Running) -> None:
    await sandbox.control("faults", source="court", quota_per_s=0.01)
    assert isinstance(await sandbox.ask("court"), Answer)
    assert await sandbox.ask("court") == "overloaded"
    assert isinstance(await sandbox.ask("tax"), Answer)


def test_a_quota_is_a_rate_with_a_burst_of_one_second() -> None:
    clock = FakeClock()
    quota = Quota(clock)
    assert sum(quota.takes(10) for _ in range(30)) == 10
    clock.advance(0.5)
    assert sum(quota.takes(10) for _ in range(30)) == 5
    clock.advance(3600)
    assert sum(quota.takes(10) for _ in range(30)) == 10


@pytest.mark.parametrize(
    "change", [{"source": "moon"}, {"moon": 1}, {"latency_ms": "x"}, {"error_rate": 2}, {"dead": "yes"}, {"hang": 1}]
)
async def test_an_impossible_fault_is_refused_and_changes_nothing(sandbox: Running, change: dict[str, Any]) -> None:
    before = await sandbox.control("faults")
    assert (await sandbox.control("faults", **change))[0] == 400
    assert await sandbox.control("faults") == before


async def test_applications_are_handed_out_for_synthetic_subjects_only(sandbox: Running) -> None:
    status, application = await sandbox.control("application/firm/5")
    assert status == 200
    assert application["parties"][0]["identity"]["value"] == credit_code(5)
    for wrong in ("application/firm/900000124", "application/person/10000000", "application/cat/1"):
        assert (await sandbox.control(wrong))[0] == 404


async def test_a_malformed_query_is_refused(sandbox: Running) -> None:
    for body in (b"{", b"[]", b'{"kind": "resident_id"}'):
        async with sandbox.session.post(f"{sandbox.url}/v1/tax/query", data=body) as answer:
            assert answer.status == 400


async def test_missing_data_is_said_and_breaks_nothing(sandbox: Running, tmp_path: Path) -> None:
    status, text = await sandbox.control("data", dir=str(tmp_path / "nowhere"))
    assert (status, "nowhere" in text) == (400, True)
    assert isinstance(await sandbox.ask("tax"), Answer)


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "cn_sme_invoices.parquet").is_file(), reason=f"no real data in {DATA}")
async def test_real_firms_are_played_and_remembered(tmp_path: Path) -> None:
    first, runner = await start(tmp_path)
    assert await first.control("data", dir=str(DATA)) == (200, {"firms": 425})
    stated = [await first.ask_for(source, "firm", real_firm_code("E124")) for source in SOURCES]
    await first.wire.close()
    await first.session.close()
    await runner.cleanup()
    found = {source: said.found for source, said in zip(SOURCES, stated, strict=True) if isinstance(said, Answer)}
    assert found == {source: source != "central_bank" for source in SOURCES}

    second, runner = await start(tmp_path)
    again = await second.ask_for("tax", "firm", real_firm_code("E124"))
    await second.wire.close()
    await second.session.close()
    await runner.cleanup()
    assert isinstance(again, Answer)
    assert [again.facts] == [
        said.facts for said in stated if isinstance(said, Answer) and "tax.sales_12m_fen" in said.facts
    ]


async def test_the_process_says_when_it_is_ready_and_leaves_on_sigterm_even_with_hanging_callers(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "lab.sandbox", "--port", "0", "--state", str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
        running = Running(f"http://{ready['address']}")
        await running.control("faults", source="tax", hang=True)
        assert await running.ask("tax") == "timeout"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 5) == 0
        await running.wire.close()
        await running.session.close()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
