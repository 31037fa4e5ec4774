"""A TCP proxy on loopback that cuts, slows and swallows: what networks do, between a caller and whom it calls."""

from __future__ import annotations

import asyncio
import contextlib

from loanmesh.runtime.clock import Clock

CHUNK_BYTES = 64 * 1024


class Proxy:
    """Passes connections on to `upstream` (host:port), as its faults allow.

    delay_s  each piece of at most 64 KiB, either way, arrives that much later.
    """

    def __init__(self, upstream: str, clock: Clock) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.delay_s = 0.0
        self.address = ""

    async def start(self) -> str:
        """Listen on a free port; the address to hand to callers."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    async def stop(self) -> None:
        """Listen no more; cut what is open."""
        self._flowing.set()
        if self._server:
            self._server.close()
        self.cut()
        if self._server:
            await self._server.wait_closed()

    def cut(self) -> int:
        """Reset all connections; how many there were. New ones are let in."""
        ends = list(self._open)
        for writer in ends:
            writer.transport.abort()
        return len(ends) // 2

    def swallow(self) -> None:
        """From now on nothing arrives any more, though connections stay open and new ones are let in."""
        self._flowing.clear()

    def flow(self) -> None:
        """What was swallowed arrives after all, in order, as after a stall of the network."""
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, onward = await asyncio.open_connection(*self._upstream)
        except OSError:  # Whom we stand for is away: so are we.
            writer.transport.abort()
            return
        ends = (writer, onward)
        self._open.update(ends)
        try:
            await asyncio.gather(self._pump(reader, onward), self._pump(there, writer))
        except OSError:  # One side broke, so the other does.
            pass
        finally:
            for end in ends:
                self._open.discard(end)
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(CHUNK_BYTES):
            if self.delay_s:
                await self._clock.sleep(self.delay_s)
            await self._flowing.wait()
            writer.write(piece)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()
