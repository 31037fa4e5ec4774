"""Kept connections: an answer is of the query that was asked, or there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import uvloop

from loanmesh.runtime.clock import SystemClock
from services.bureau.http import Http


def answer(said: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(said)}\r\n\r\n{said}".encode()


class Source:
    """Answers each query with what was asked, and says more where it is told to."""

    def __init__(self) -> None:
        self.connections: list[asyncio.Transport] = []
        self.before = b""
        """What it says before the next answer."""
        self.forgets_marks = False

    def connection(self) -> asyncio.Protocol:
        return Connection(self)


class Connection(asyncio.Protocol):
    def __init__(self, source: Source) -> None:
        self._source = source

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._source.connections.append(self._transport)

    def data_received(self, data: bytes) -> None:
        # So short a query comes in one piece.
        _, _, asked = data.decode().partition("\r\n\r\n")
        said = "of somebody" if self._source.forgets_marks else f"about {asked}"
        self._transport.write(self._source.before + answer(said))
        self._source.before = b""


@asynccontextmanager
async def asking() -> AsyncIterator[tuple[Source, Http]]:
    source = Source()
    server = await asyncio.get_running_loop().create_server(source.connection, "127.0.0.1", 0)
    http = Http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", SystemClock())
    try:
        async with asyncio.timeout(10):
            yield source, http
    finally:
        http.close()
        for transport in source.connections:
            transport.abort()
        server.close()


LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
NewLoop = Callable[[], asyncio.AbstractEventLoop]


@LOOPS
def test_a_connection_is_kept_while_its_source_says_what_it_is_asked(new_loop: NewLoop) -> None:
    async def ask() -> None:
        async with asking() as (source, http):
            for subject in (b"one", b"two", b"three"):
                assert await http.post("/q", subject, subject, 100) == (200, b"about " + subject, True)
            assert len(source.connections) == 1

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())


@LOOPS
@pytest.mark.parametrize("more", [answer("about one, again"), b"H"], ids=["whole", "begun"])
@pytest.mark.parametrize("turns", [0, 10])
def test_an_answer_that_nobody_asked_for_is_not_the_next_subjects(new_loop: NewLoop, more: bytes, turns: int) -> None:
    async def ask() -> None:
        async with asking() as (source, http):
            assert await http.post("/q", b"one", b"one", 100) == (200, b"about one", True)
            source.connections[0].write(more)
            for _ in range(turns):  # Whether the loop has read it by then must not matter.
                await asyncio.sleep(0)  # noqa: TID251  Gives way, and takes no time.
            assert await http.post("/q", b"two", b"two", 100) == (200, b"about two", True)
            assert len(source.connections) == 2

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())


@LOOPS
def test_an_answer_that_came_after_the_next_query_went_out_is_not_sure_to_be_its_own(new_loop: NewLoop) -> None:
    async def ask() -> None:
        async with asking() as (source, http):
            assert await http.post("/q", b"one", b"one", 100) == (200, b"about one", True)
            source.before = answer("about one, again")
            assert await http.post("/q", b"two", b"two", 100) == (200, b"about one, again", False)
            assert await http.post("/q", b"three", b"three", 100) == (200, b"about three", True)
            assert len(source.connections) == 2

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())


@LOOPS
def test_a_source_that_repeats_no_marks_is_asked_on_a_new_connection_each_time(new_loop: NewLoop) -> None:
    async def ask() -> None:
        async with asking() as (source, http):
            source.forgets_marks = True
            for subject in (b"one", b"two"):
                assert await http.post("/q", subject, subject, 100) == (200, b"of somebody", True)
            assert len(source.connections) == 2

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(ask())
