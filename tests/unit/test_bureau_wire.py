"""The wire against real sockets: each way a source can fail has its word, and none of them raises."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from pydantic import SecretStr

from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.keys import new_ring, write_ring
from loanmesh.runtime.setting_rules import WrongSetting
from loanmesh.runtime.settings import PrivacySettings
from loanmesh.runtime.token_file import TokenFile
from services.bureau.gather import Subject
from services.bureau.main import build
from services.bureau.profile import Answer
from services.bureau.settings import BureauSettings
from services.bureau.sources import load_sources
from services.bureau.wire import BODY_BYTES_MAX, HttpWire

COURT = load_sources()["court"]
SUBJECT = Subject("firm", "unified_social_credit_code", "x")
NOW = SystemClock().now().isoformat()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
WireTo = Callable[[Handler], Awaitable[HttpWire]]
Ask = Callable[[Handler], Awaitable[Answer | str]]


@pytest.fixture
async def wire_to() -> AsyncIterator[WireTo]:
    """A wire to a source that is played by a handler."""
    closing: list[Callable[[], Awaitable[None]]] = []

    async def make(handler: Handler) -> HttpWire:
        app = web.Application()
        app.router.add_post("/v1/court/query", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        wire = HttpWire(f"http://127.0.0.1:{runner.addresses[0][1]}/", SystemClock(), 0.4, random.Random(1))
        closing.extend((wire.close, runner.cleanup))
        return wire

    yield make
    for close in closing:
        await close()


@pytest.fixture
def ask(wire_to: WireTo) -> Ask:
    """Asks such a source once."""

    async def once(handler: Handler) -> Answer | str:
        return await (await wire_to(handler)).ask(COURT, SUBJECT)

    return once


def answers(body: Any, status: int = 200) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        assert len(asked.pop("query")) == 32
        assert asked == {"kind": "unified_social_credit_code", "value": "x"}
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


async def test_a_connection_is_used_again_until_its_source_ends_it(wire_to: WireTo) -> None:
    ports: list[int] = []

    async def keeps(request: web.Request) -> web.StreamResponse:
        assert request.transport
        ports.append(request.transport.get_extra_info("peername")[1])
        mark = (await request.json())["query"]
        response = web.json_response({"query": mark, "observed_at": NOW, "facts": {}})
        if len(ports) == 2:
            response.force_close()
        return response

    wire = await wire_to(keeps)
    for _ in range(4):
        assert isinstance(await wire.ask(COURT, SUBJECT), Answer)
    assert ports[0] == ports[1] != ports[2] == ports[3]


async def test_queries_side_by_side_do_not_share_a_connection(wire_to: WireTo) -> None:
    count, all_here = 0, asyncio.Event()

    async def waits_for_three(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count == 3:
            all_here.set()
        await all_here.wait()
        return web.json_response({"observed_at": NOW, "facts": {"court.enforcement_open_count": count}})

    wire = await wire_to(waits_for_three)
    said = await asyncio.gather(*(wire.ask(COURT, SUBJECT) for _ in range(3)))
    assert all(isinstance(one, Answer) for one in said)


async def test_the_answer_to_a_query_that_timed_out_is_not_taken_for_the_next_ones(wire_to: WireTo) -> None:
    asked = 0

    async def slow_at_first(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        count = asked
        if count == 1:
            await asyncio.Event().wait()
        return web.json_response({"observed_at": NOW, "facts": {"court.enforcement_open_count": count}})

    wire = await wire_to(slow_at_first)
    assert await wire.ask(COURT, SUBJECT) == "timeout"
    said = await wire.ask(COURT, SUBJECT)
    assert isinstance(said, Answer)
    assert said.facts == {"court.enforcement_open_count": 2}


class Repeats:
    """A source that answers each query twice: at once, or only when the next one has come on its connection."""

    def __init__(self, *, at_once: bool, marks: bool) -> None:
        self._at_once = at_once
        self._marks = marks

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before = b""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                answer = self._answer(json.loads(await reader.readexactly(length)))
                writer.write(answer * 2 if self._at_once else before + answer)
                before = answer
        writer.close()

    def _answer(self, asked: dict[str, str]) -> bytes:
        said: dict[str, object] = {"observed_at": NOW, "facts": {"court.enforcement_open_count": int(asked["value"])}}
        if self._marks:
            said["query"] = asked["query"]
        body = json.dumps(said).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_answer_that_comes_twice_is_never_the_next_persons(at_once: bool, marks: bool) -> None:
    server = await asyncio.start_server(Repeats(at_once=at_once, marks=marks).serve, "127.0.0.1", 0)
    wire = HttpWire(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", SystemClock(), 5, random.Random(1))
    for number in range(5):
        said = await wire.ask(COURT, Subject("firm", "unified_social_credit_code", str(number)))
        assert isinstance(said, Answer)
        assert said.facts == {"court.enforcement_open_count": number}
    await wire.close()
    server.close()


async def test_an_answer_to_another_query_is_garbage(ask: Ask) -> None:
    said = await ask(answers({"query": "0" * 32, "observed_at": NOW, "facts": {"court.enforcement_open_count": 2}}))
    assert said == "garbage"


async def test_an_answer_may_come_in_pieces(ask: Ask) -> None:
    async def pieces(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for character in json.dumps({"observed_at": NOW, "facts": {}}):
            await response.write(character.encode())
        return response

    assert isinstance(await ask(pieces), Answer)


async def test_a_redirect_is_not_followed_with_a_persons_number(ask: Ask) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect("/v1/court/query?again")

    assert await ask(elsewhere) == "refused"


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"])
async def test_what_is_no_http_is_unavailable(said: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    wire = HttpWire(f"http://127.0.0.1:{address[1]}", SystemClock(), 2, random.Random(1))
    assert await wire.ask(COURT, SUBJECT) == "unavailable"
    await wire.close()
    server.close()


async def test_nobody_listens(unused_address: str) -> None:
    wire = HttpWire(f"http://{unused_address}", SystemClock(), 2, random.Random(1))
    assert await wire.ask(COURT, SUBJECT) == "unavailable"
    await wire.close()


@pytest.fixture
def unused_address() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


async def test_a_token_proves_us_to_the_source_and_is_always_the_newest(tmp_path: Path) -> None:
    shown = []

    async def handler(request: web.Request) -> web.StreamResponse:
        shown.append(request.headers.get("Authorization"))
        return web.Response(status=404)

    app = web.Application()
    app.router.add_post("/v1/court/query", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    file = tmp_path / "token"
    file.write_text("first\n")
    proof = TokenFile(file).token
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    wire = HttpWire(url, SystemClock(), 5.0, random.Random(1), proof)
    await wire.ask(COURT, SUBJECT)
    for text in ("second", "two words", "third\r\nX-Evil: 1"):
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(file)
        await wire.ask(COURT, SUBJECT)
    file.unlink()
    await wire.ask(COURT, SUBJECT)
    assert shown == ["Bearer first"] + ["Bearer second"] * 4
    await wire.close()
    await runner.cleanup()


@pytest.mark.parametrize(
    ("url", "content", "said"),
    [
        ("http://sources.example", "token", "BUREAU_SOURCES_URL: a token would go there unencrypted"),
        ("https://sources.example", None, "BUREAU_SOURCES_TOKEN_FILE: No such file"),
        ("https://sources.example", "two words", "BUREAU_SOURCES_TOKEN_FILE: "),
    ],
)
async def test_a_token_that_cannot_be_used_stops_the_start(
    tmp_path: Path, url: str, content: str | None, said: str
) -> None:
    file = tmp_path / "token"
    if content:
        file.write_text(content)
    keys = tmp_path / "keys.json"
    write_ring(keys, new_ring(SystemClock().now()), new=True)
    settings = BureauSettings(
        sources_url=url,
        sources_token_file=str(file),
        database_url=SecretStr(f"sqlite:///{tmp_path}/bureau.db"),
        privacy=PrivacySettings(keys_file=str(keys)),
    )
    with pytest.raises(WrongSetting, match=said):
        await build(settings, SystemClock())


@pytest.mark.parametrize(("signed_for", "word"), [("127.0.0.1", "facts"), ("127.0.0.2", "unavailable")])
async def test_a_source_behind_tls_is_asked_where_its_certificate_is_its_own(
    signed_for: str, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(signed_for).configure_cert(tls)
    app = web.Application()
    app.router.add_post("/v1/court/query", answers({"observed_at": NOW, "facts": {}}))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    wire = HttpWire(f"https://127.0.0.1:{runner.addresses[0][1]}", SystemClock(), 5, random.Random(1))
    said = await wire.ask(COURT, SUBJECT)
    assert ("facts" if isinstance(said, Answer) else said) == word
    await wire.close()
    await runner.cleanup()
