"""The proxy passes bytes on, and cuts, slows and swallows them when told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lab.proxy import Proxy
from loanmesh.runtime.clock import FakeClock

LONG = b"x" * 300_000


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    """Address of a server that sends back what it hears."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(10_000):
            writer.write(piece)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.fixture
async def proxy(echo: str) -> AsyncIterator[Proxy]:
    made = Proxy(echo, FakeClock())
    await made.start()
    yield made
    await made.stop()


Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(proxy: Proxy) -> Ends:
    host, port = proxy.address.split(":")
    return await asyncio.open_connection(host, int(port))


async def echoed(ends: Ends, said: bytes) -> bytes:
    reader, writer = ends
    writer.write(said)
    await writer.drain()
    return await reader.readexactly(len(said))


async def test_bytes_come_through_unchanged_and_both_ends_close(proxy: Proxy) -> None:
    reader, writer = ends = await connect(proxy)
    sending = asyncio.create_task(echoed(ends, LONG))
    assert await sending == LONG
    writer.write_eof()
    assert await reader.read() == b""


async def test_a_cut_resets_what_is_open_and_lets_new_ones_in(proxy: Proxy) -> None:
    ends = await connect(proxy)
    assert await echoed(ends, b"hello") == b"hello"
    assert proxy.cut() == 1
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await echoed(ends, b"hello")
    assert await echoed(await connect(proxy), b"again") == b"again"


async def test_what_is_swallowed_arrives_when_it_flows_again(proxy: Proxy) -> None:
    ends = await connect(proxy)
    assert await echoed(ends, b"before") == b"before"
    proxy.swallow()
    waiting = asyncio.create_task(echoed(ends, b"during"))
    new = asyncio.create_task(echoed(await connect(proxy), b"new"))
    done, _ = await asyncio.wait({waiting, new}, timeout=0.1)
    assert not done
    proxy.flow()
    assert [await waiting, await new] == [b"during", b"new"]


async def test_delay_is_taken_from_the_clock_for_each_piece(echo: str) -> None:
    clock = FakeClock()
    proxy = Proxy(echo, clock)
    await proxy.start()
    proxy.delay_s = 7.0
    assert await echoed(await connect(proxy), b"hello") == b"hello"
    assert clock.monotonic() == 14.0
    await proxy.stop()


async def test_where_nobody_listens_the_caller_is_cut_off(echo: str) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    proxy = Proxy(f"127.0.0.1:{port}", FakeClock())
    await proxy.start()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await echoed(await connect(proxy), b"hello")
    await proxy.stop()


async def test_a_stopped_proxy_is_not_there(proxy: Proxy) -> None:
    ends = await connect(proxy)
    assert await echoed(ends, b"hello") == b"hello"
    await proxy.stop()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await echoed(ends, b"hello")
    with pytest.raises(ConnectionRefusedError):
        await connect(proxy)
