"""HTTP/2 by hand (RFC 9113), for what no well-behaved gRPC client does: stay silent, send half, send a bomb."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Iterator, Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x7, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
CONTINUATION = 0x9
FRAME_MAX = 16_384
Headers = Sequence[tuple[str, str]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def call_headers(path: str, more: Headers = ()) -> bytes:
    """A gRPC request's headers, each a literal that nobody indexes (RFC 7541, 6.2.2)."""
    fields = [
        (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"),
        ("content-type", "application/grpc"), ("te", "trailers"), *more,
    ]  # fmt: skip
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    length, rest = b"\x7f", len(data) - 127
    while rest >= 128:
        length += bytes([rest % 128 + 128])
        rest //= 128
    return length + bytes([rest]) + data


def gzip_of_zeros(size: int) -> bytes:
    """A gzip stream that unpacks to `size` zeros; about a thousandth of that."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(size >> 20)), packer.flush()])


class Raw:
    """A connection on which the test says every byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._room = {0: 65_535}
        self._first_room = 65_535
        self._more_room = asyncio.Event()
        self.frames: list[tuple[int, int, bytes]] = []
        self.closed = asyncio.Event()
        self._reading = asyncio.create_task(self._read_forever())

    @classmethod
    async def connect(cls, address: str, greet: bool = True) -> Raw:
        """Connect; with `greet`, also send the preface and empty settings."""
        host, port = address.rsplit(":", 1)
        raw = cls(*await asyncio.open_connection(host, int(port)))
        if greet:
            raw.send(PREFACE + frame(SETTINGS, 0, 0))
        return raw

    def send(self, data: bytes) -> None:
        """Send as it is."""
        self._writer.write(data)

    def call(self, stream: int, path: str, more: Headers = ()) -> None:
        """Open a stream with a request's headers, and leave it open."""
        block = call_headers(path, more)
        parts = [block[at : at + FRAME_MAX] for at in range(0, len(block), FRAME_MAX)]
        for number, part in enumerate(parts):
            last = END_HEADERS if number == len(parts) - 1 else 0
            self.send(frame(HEADERS if number == 0 else CONTINUATION, last, stream, part))

    async def message(self, stream: int, body: bytes, *, compressed: bool = False) -> None:
        """Send a whole message on the stream, as fast as the server takes it, and end our side."""
        data = struct.pack("!BI", compressed, len(body)) + body
        self._room.setdefault(stream, self._first_room)
        for part in self._parts(data):
            while min(self._room[0], self._room[stream]) < len(part):
                self._more_room.clear()
                await self._more_room.wait()
            self._room[0] -= len(part)
            self._room[stream] -= len(part)
            self.send(frame(DATA, 0, stream, part))
            await self._writer.drain()
        self.send(frame(DATA, END_STREAM, stream))

    def _parts(self, data: bytes) -> Iterator[bytes]:
        return (data[at : at + FRAME_MAX] for at in range(0, len(data), FRAME_MAX))

    async def answer(self, stream: int) -> bytes:
        """All that the server sent on the stream, header blocks included, once it has ended it."""
        while not self.closed.is_set():
            mine = [f for f in self.frames if f[1] == stream]
            if any(kind == RST_STREAM for kind, _, _ in mine) or self._ended(stream):
                break
            await self._next()
        return b"".join(payload for _, of, payload in self.frames if of == stream)

    def kinds(self) -> set[int]:
        """Kinds of frames seen so far."""
        return {kind for kind, _, _ in self.frames}

    def _ended(self, stream: int) -> bool:
        return stream in self._over

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()

    async def _read_forever(self) -> None:
        self._news, self._over = asyncio.Event(), set[int]()
        try:
            while True:
                head = await self._reader.readexactly(9)
                length = int.from_bytes(head[:3], "big")
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFF_FFFF
                payload = await self._reader.readexactly(length)
                self.frames.append((kind, stream, payload))
                if kind == SETTINGS and not flags & ACK:
                    for at in range(0, length, 6):
                        name, value = struct.unpack("!HI", payload[at : at + 6])
                        if name == 0x4:
                            for known in self._room.keys() - {0}:
                                self._room[known] += value - self._first_room
                            self._first_room = value
                    self.send(frame(SETTINGS, ACK, 0))
                elif kind == WINDOW_UPDATE:
                    room = self._room.get(stream, self._first_room)
                    self._room[stream] = room + int.from_bytes(payload, "big")
                if kind in (DATA, HEADERS) and flags & END_STREAM:
                    self._over.add(stream)
                self._more_room.set()
                self._news.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed.set()
            self._news.set()
            self._more_room.set()

    async def close(self) -> None:
        """Close our side."""
        self._reading.cancel()
        self._writer.close()
