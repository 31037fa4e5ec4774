"""HTTP to the sources: POST over connections that are kept, by aiohttp's protocol and parser without its session.

The session (cookies, redirects, tracing, middlewares, payload types) is a third of what a query costs bureau, and a
source needs none of it.

An answer of HTTP does not say whose it is: one that comes late, or twice, is taken for that to the next query on its
connection. So each query has a mark, which its answer repeats; a connection is kept only where it did.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from collections import deque
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import HttpProcessingError

from loanmesh.runtime.clock import Clock

IDLE_S_MAX = 15.0
"""How long a connection is kept that nobody uses; shorter than servers keep theirs, so that few are closed under us."""


class _Connection(ResponseHandler):
    """One that is not used again after anything came on it while it was idle."""

    idle = False

    def data_received(self, data: bytes) -> None:
        if self.idle:
            self.force_close()
        super().data_received(data)

    def is_quiet(self) -> bool:
        """Whether it is open, and nothing came since its last answer."""
        transport = self.transport
        if transport is None or transport.is_closing() or self.should_close:
            return False
        # What has arrived, but was not read yet.
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)


class Said(NamedTuple):
    """What came back. body  None: longer than it may be."""

    status: int
    body: bytes | None
    sure: bool
    """Whether it can be to no other query: it repeats this one's mark, or came first on its connection."""


class Http:
    """Keeps connections to one host. As many are open as calls are under way: the callers bound them.

    token  what to prove ourselves with, asked for each call; None where the sources want nothing.
    """

    def __init__(self, base_url: str, clock: Clock, token: Callable[[], str] | None = None) -> None:
        url = urlsplit(base_url)
        tls = url.scheme == "https"
        self._tls = ssl.create_default_context() if tls else None
        assert url.hostname
        self._host, self._port = url.hostname, url.port or (443 if tls else 80)
        self._path = url.path.rstrip("/")
        self._headers = f"Host: {url.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
        self._token = token
        self._clock = clock
        # Newest last: what is used again is the one used last, so that the others get old and are closed.
        self._idle: deque[tuple[float, _Connection]] = deque()

    async def post(self, path: str, body: bytes, mark: bytes, bytes_max: int) -> Said:
        """The answer to some JSON. Follows no redirects.

        mark  stands in `body`, and in no other query's.
        Raises ClientConnectionError where the connection breaks, another ClientError where the answer is no HTTP.
        What is cancelled closes its connection.
        """
        connection = self._take()
        is_first = connection is None
        if connection is None:  # Not by its truth: a connection without an answer in it is false.
            connection = await self._connect()
        try:
            if connection.transport is None:
                raise aiohttp.ClientConnectionError("the connection broke")
            proof = f"Authorization: Bearer {self._token()}\r\n" if self._token else ""
            start = f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}{proof}Content-Length: {len(body)}\r\n\r\n"
            connection.transport.write(start.encode("ascii") + body)
            # Each answer needs a parser of its own; without this one there is none.
            connection.set_response_params(auto_decompress=False, read_until_eof=True)
            message, content = await connection.read()
            while 100 <= message.code < 200:
                message, content = await connection.read()
            read = bytearray()
            while not content.at_eof():
                read += await content.readany()
                if len(read) > bytes_max:
                    connection.close()
                    return Said(message.code, None, is_first)
        except HttpProcessingError as error:
            connection.close()
            raise aiohttp.ClientError("the answer is no HTTP") from error
        except BaseException:
            connection.close()
            raise
        is_marked = mark in read
        if is_marked:
            self._give_back(connection)
        else:
            connection.close()
        return Said(message.code, bytes(read), is_first or is_marked)

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop()[1].close()

    def _take(self) -> _Connection | None:
        while self._idle:
            since, connection = self._idle.pop()
            if connection.is_quiet() and self._clock.monotonic() - since < IDLE_S_MAX:
                connection.idle = False
                return connection
            connection.close()
        return None

    def _give_back(self, connection: _Connection) -> None:
        if connection.should_close:
            connection.close()
            return
        connection.idle = True
        now = self._clock.monotonic()
        self._idle.append((now, connection))
        while now - self._idle[0][0] >= IDLE_S_MAX:
            self._idle.popleft()[1].close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(loop), self._host, self._port, ssl=self._tls
            )
        except OSError as error:
            raise aiohttp.ClientConnectionError(str(error)) from error
        return connection
