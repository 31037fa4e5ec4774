"""The wire against real sockets: each way a source can fail has its word, and none of them raises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import Any

import pytest
from aiohttp import web

from loanmesh.runtime.clock import SystemClock
from services.bureau.gather import Subject
from services.bureau.profile import Answer
from services.bureau.sources import load_sources
from services.bureau.wire import BODY_BYTES_MAX, HttpWire

COURT = load_sources()["court"]
SUBJECT = Subject("firm", "unified_social_credit_code", "x")
NOW = SystemClock().now().isoformat()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Ask = Callable[[Handler], Awaitable[Answer | str]]


@pytest.fixture
async def ask() -> AsyncIterator[Ask]:
    """Asks a source that is played by a handler."""
    closing: list[Callable[[], Awaitable[None]]] = []

    async def once(handler: Handler) -> Answer | str:
        app = web.Application()
        app.router.add_post("/v1/court/query", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        wire = HttpWire(f"http://127.0.0.1:{runner.addresses[0][1]}/", SystemClock(), timeout_s=0.4)
        closing.extend((wire.close, runner.cleanup))
        return await wire.ask(COURT, SUBJECT)

    yield once
    for close in closing:
        await close()


def answers(body: Any, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert await request.json() == {"kind": "unified_social_credit_code", "value": "x"}
        text = body if isinstance(body, str) else json.dumps(body)
        return web.Response(text=text, status=status, content_type="application/json")

    return handler


async def test_facts_and_their_time_arrive(ask: Ask) -> None:
    asked = SystemClock().now()
    said = await ask(answers({"observed_at": NOW, "facts": {"court.enforcement_open_count": 2}}))
    assert isinstance(said, Answer)
    assert (said.found, said.facts) == (True, {"court.enforcement_open_count": 2})
    assert said.observed_at == datetime.fromisoformat(NOW).timestamp()
    assert asked.timestamp() <= said.fetched_at <= SystemClock().now().timestamp()


async def test_not_known_is_a_fact(ask: Ask) -> None:
    said = await ask(answers({"observed_at": NOW, "facts": {}}, status=404))
    assert isinstance(said, Answer)
    assert not said.found


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>",
        "[" * 50_000,
        "[]",
        "null",
        {"facts": {}},
        {"observed_at": NOW},
        {"observed_at": 5, "facts": {}},
        {"observed_at": "yesterday", "facts": {}},
        {"observed_at": "2026-01-01T00:00:00", "facts": {}},
        {"observed_at": "2999-01-01T00:00:00+00:00", "facts": {}},
        {"observed_at": "0001-01-01T00:00:00+00:00", "facts": {}},
        {"observed_at": NOW, "facts": []},
        {"observed_at": NOW, "facts": {"court.moon": 1}},
        {"observed_at": NOW, "facts": {}, "padding": "x" * BODY_BYTES_MAX},
    ],
)
async def test_nonsense_is_garbage(ask: Ask, body: Any) -> None:
    assert await ask(answers(body)) == "garbage"


async def test_a_proxys_404_is_no_evidence(ask: Ask) -> None:
    assert await ask(answers("not here", status=404)) == "garbage"


@pytest.mark.parametrize(("status", "word"), [(500, "unavailable"), (429, "overloaded"), (403, "refused")])
async def test_a_status_has_its_word(ask: Ask, status: int, word: str) -> None:
    assert await ask(answers("", status=status)) == word


async def test_a_failed_try_is_repeated_once(ask: Ask) -> None:
    tried = 0

    async def flaky(request: web.Request) -> web.StreamResponse:
        nonlocal tried
        tried += 1
        if tried == 1:
            return web.Response(status=503)
        return web.json_response({"observed_at": NOW, "facts": {}})

    assert isinstance(await ask(flaky), Answer)
    assert tried == 2


async def test_a_cut_connection_is_tried_twice_and_no_more(ask: Ask) -> None:
    tried = 0

    async def dead(request: web.Request) -> web.StreamResponse:
        nonlocal tried
        tried += 1
        assert request.transport
        request.transport.abort()
        return web.Response()

    assert await ask(dead) == "unavailable"
    assert tried == 2


async def test_silence_ends_at_the_timeout(ask: Ask) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    assert await ask(hang) == "timeout"


async def test_nobody_listens(unused_address: str) -> None:
    wire = HttpWire(f"http://{unused_address}", SystemClock(), timeout_s=2)
    assert await wire.ask(COURT, SUBJECT) == "unavailable"
    await wire.close()


@pytest.fixture
def unused_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
