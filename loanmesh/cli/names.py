"""Names of services on this machine: a name server on loopback that knows the replicas of each.

It stands where a cluster has the DNS of a headless service, so that services and callers find replicas here in the same
way as there: `dns://127.0.0.1:7401/bureau.loanmesh:7402`, looked up again whenever a connection ends of age. All
replicas of a service listen on one port, each on a loopback address of its own, since a name leads to addresses only.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import Callable, Sequence

DOMAIN = "loanmesh"
TTL_S = 1
_A, _IN = 1, 1
_ANSWER, _NO_SUCH_NAME = 0x8580, 0x8583  # Authoritative; the second with NXDOMAIN.
_HEADER_BYTES = 12


def answer(packet: bytes, addresses_of: Callable[[str], Sequence[str] | None]) -> bytes:
    """The answer to one DNS question (RFC 1035): IPv4 addresses, none for other types, NXDOMAIN for other names.

    addresses_of  addresses of a service, None when there is no such service. Raises ValueError where
                  the packet is no question.
    """
    service, end = _first_label(packet)
    kind, class_ = struct.unpack_from("!HH", packet, end)
    end += 4
    # Only the first label counts: a resolver may try the host's search domains behind it.
    known = addresses_of(service)
    found = [ipaddress.IPv4Address(a).packed for a in known or ()] if (kind, class_) == (_A, _IN) else []
    flags = _NO_SUCH_NAME if known is None else _ANSWER
    header = packet[:2] + struct.pack("!HHHHH", flags, 1, len(found), 0, 0)
    # 0xC00C points back at the question's name.
    records = (struct.pack("!HHHIH", 0xC00C, _A, _IN, TTL_S, 4) + address for address in found)
    return header + packet[_HEADER_BYTES:end] + b"".join(records)


def _first_label(packet: bytes) -> tuple[str, int]:
    """First label of the question's name, in lower case, and where the question's type begins."""
    labels: list[bytes] = []
    at = _HEADER_BYTES
    while at < len(packet) and packet[at]:
        length = packet[at]
        if length > 63:  # A pointer, which no question has.
            raise ValueError("the name is compressed")
        labels.append(packet[at + 1 : at + 1 + length])
        at += 1 + length
    if not labels or at + 5 > len(packet):
        raise ValueError("the question is cut short")
    return labels[0].decode("ascii", "replace").lower(), at + 1


class NameServer(asyncio.DatagramProtocol):
    """Answers for the services in `addresses`, which its owner changes as replicas come and go."""

    def __init__(self) -> None:
        self.addresses: dict[str, list[str]] = {}
        self._transport: asyncio.DatagramTransport | None = None
        self._closed = asyncio.Event()

    async def start(self, port: int) -> None:
        """Listen on 127.0.0.1, UDP. Raises OSError when the port is taken."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, ("127.0.0.1", port))

    async def stop(self) -> None:
        """Answer no more; the port is free when this returns."""
        if self._transport:
            self._transport.close()
            await self._closed.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self._closed.set()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer a question; what is none is dropped, as a name server may."""
        try:
            reply = answer(data, self.addresses.get)
        except ValueError:
            return
        if self._transport:
            self._transport.sendto(reply, addr)


def target(name_server_port: int, service: str, port: int) -> str:
    """What to hand to gRPC to reach all replicas of a service."""
    return f"dns://127.0.0.1:{name_server_port}/{service}.{DOMAIN}:{port}"
