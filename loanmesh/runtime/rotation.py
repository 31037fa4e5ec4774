"""A channel over TLS that outlives its certificates.

grpcio cannot give a channel new ones, so a channel is made anew when the files change. The new one connects first, then
takes all new calls; the old one is closed when the last of its calls has ended. There is never none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import structlog

from loanmesh.runtime.certificates import Watched
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.lasting import Lasting

CONNECT_WITHIN_S = 5.0
"""How long a new channel may take to connect before the old one, where that still works, is kept for a while."""
log = structlog.get_logger()
_Make = Callable[[grpc.aio.Channel], Any]
Open = Callable[[grpc.ChannelCredentials], grpc.aio.Channel]


class _Generation:
    """One channel, and the calls that are under way on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self._callables: dict[_Make, Any] = {}
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def call(self, make: _Make, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if make not in self._callables:
            self._callables[make] = make(self.channel)
        call = self._callables[make](*arguments, **options)
        self._calls += 1
        self._idle.clear()
        call.add_done_callback(self._ended)
        return call

    def _ended(self, _: Any) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()

    async def retire(self) -> None:
        """Close when the last call has ended. Not by the channel's own grace: a call whose interceptor has not begun
        yet is unknown to it, and would fail."""
        await self._idle.wait()
        await self.channel.close()


class RotatingChannel(grpc.aio.Channel):
    """A channel as stubs take it.

    open_     makes a channel with the given credentials.
    reload_s  how often the files are looked at, seconds; from the first call on.
    """

    def __init__(self, watched: Watched, open_: Open, reload_s: float, clock: Clock) -> None:
        self._watched = watched
        self._open = open_
        self._reload_s = reload_s
        self._clock = clock
        self._now = _Generation(open_(credentials(watched)))
        self.rotations = 0
        """How often it was moved to a new channel."""
        self._watching: asyncio.Task[None] | None = None
        self._retiring: dict[asyncio.Task[None], _Generation] = {}

    @property
    def retiring(self) -> int:
        """Channels that only wait for their last calls."""
        return len(self._retiring)

    async def __aenter__(self) -> RotatingChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Close all, with the calls still under way after `grace` seconds."""
        # Who watches first: it may be about to retire one more.
        for task in (*([self._watching] if self._watching else []), *self._retiring):
            task.cancel()
            await asyncio.wait([task])
        open_ = (self._now, *self._retiring.values())
        await asyncio.gather(*(generation.channel.close(grace) for generation in open_))

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """Of the channel that takes new calls."""
        return self._now.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Of the channel that takes new calls."""
        await self._now.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Until the channel that takes new calls is connected."""
        await self._now.channel.channel_ready()

    def unary_unary(self, *how: Any, **named: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._callable(lambda channel: channel.unary_unary(*how, **named))

    def unary_stream(self, *how: Any, **named: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._callable(lambda channel: channel.unary_stream(*how, **named))

    def stream_unary(self, *how: Any, **named: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._callable(lambda channel: channel.stream_unary(*how, **named))

    def stream_stream(self, *how: Any, **named: Any) -> Any:
        """See grpc.aio.Channel."""
        return self._callable(lambda channel: channel.stream_stream(*how, **named))

    def _callable(self, make: _Make) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._watching is None:
                self._watching = asyncio.create_task(self._watch())
            return self._now.call(make, arguments, options)

        return call

    async def _watch(self) -> None:
        behind, lasting = False, Lasting("channel_rotation")
        while True:
            await self._clock.sleep(self._reload_s)
            with lasting:
                behind |= self._watched.look()
                if behind:
                    behind = not await self._move()

    async def _move(self) -> bool:
        """To a channel with what the files hold now; False where that does not connect, but the old one is."""
        new = self._open(credentials(self._watched))
        try:
            connects = await _connects(new)
        except BaseException:
            await new.close()
            raise
        if not connects and self._now.channel.get_state() is grpc.ChannelConnectivity.READY:
            log.warning("channel_not_moved", error_type="tls_new_certificate_refused", kept="the one before")
            await new.close()
            return False
        old, self._now = self._now, _Generation(new)
        self.rotations += 1
        retiring = asyncio.create_task(old.retire())
        self._retiring[retiring] = old
        retiring.add_done_callback(self._retired)
        return True

    def _retired(self, task: asyncio.Task[None]) -> None:
        # One that was cut short is closed with the rest.
        if not task.cancelled():
            del self._retiring[task]


async def _connects(channel: grpc.aio.Channel) -> bool:
    try:
        async with asyncio.timeout(CONNECT_WITHIN_S):
            await channel.channel_ready()
    except TimeoutError:
        return False
    return True


def credentials(watched: Watched) -> grpc.ChannelCredentials:
    """What the files held at the last look, as a client shows it."""
    material = watched.material
    return grpc.ssl_channel_credentials(material.ca_pem, material.key_pem or None, material.certificate_pem or None)


def named(server_name: str) -> Sequence[tuple[str, str]]:
    """Options by which the server's certificate must state this name, whatever the address it was reached by."""
    return [("grpc.default_authority", server_name)]
