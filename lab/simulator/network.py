"""gRPC without sockets: what grpc.aio promises a caller and a handler, over messages that take time and get lost.

Requests and answers are really serialised, deadlines and cancellations travel, a dead process resets its calls, and a
channel retries as its service config says. Connections are round robin over those believed to be up.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import grpc
from grpc.aio import AioRpcError, Metadata

from lab.simulator.loop import Handle, Node, VirtualLoop

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
OK = grpc.StatusCode.OK
FAR_S = 1e9
KEEPALIVE_S = 25.0
"""How long a connection may be dead before both ends know, where nothing resets it."""
HOP_S_MAX = 10.0
"""No call between services is given longer than this."""
served_until: ContextVar[float | None] = ContextVar("served_until", default=None)
"""When the call that is being handled must be answered, virtual seconds."""
asked_for: ContextVar[list[int] | None] = ContextVar("asked_for", default=None)
"""Counts attempts on behalf of one question of the pipeline."""


@dataclass
class Weather:
    """How bad the network is just now."""

    loss: float = 0.0
    """Share of messages that do not arrive."""
    duplicates: float = 0.0
    """Share of requests that arrive twice, as after a connection that broke at the worst moment."""
    latency_s: float = 0.001
    """Mean of one way; single ones are drawn, so that they overtake each other."""
    cut: set[tuple[str, str]] = field(default_factory=set)
    """Pairs of services that cannot reach each other."""


class Observer(Protocol):
    """Who is told what no caller may ever see."""

    def violate(self, rule: str, application: str, text: str) -> None: ...
    def trace(self, text: str) -> None: ...
    def stored(self, application_id: str, is_free: int) -> None: ...
    def looked_at(self, application_id: str, attempts: int) -> None: ...
    def mend(self, application_id: str) -> None: ...


@dataclass(frozen=True)
class Retry:
    """A channel's retryPolicy and retryThrottling, of gRPC's own form."""

    attempts_max: int
    first_s: float
    factor: float
    most_s: float
    codes: frozenset[grpc.StatusCode]
    tokens_max: float
    token_ratio: float

    @classmethod
    def of(cls, service_config: Mapping[str, Any]) -> Retry:
        """From the service config that real channels are given."""
        policy = service_config["methodConfig"][0]["retryPolicy"]
        throttling = service_config["retryThrottling"]
        return cls(
            policy["maxAttempts"], float(policy["initialBackoff"][:-1]), policy["backoffMultiplier"],
            float(policy["maxBackoff"][:-1]), frozenset(grpc.StatusCode[c] for c in policy["retryableStatusCodes"]),
            throttling["maxTokens"], throttling["tokenRatio"],
        )  # fmt: skip


class Network:
    """Carries messages between nodes."""

    def __init__(self, loop: VirtualLoop, dice: random.Random, observer: Observer) -> None:
        self.loop = loop
        self.dice = dice
        self.observer = observer
        self.weather = Weather()
        self.servers: dict[str, list[Server]] = defaultdict(list)
        self.attempts: dict[str, int] = defaultdict(int)
        """Attempts that reached a server, by service."""

    def latency_s(self) -> float:
        """One way, this time."""
        return 0.0002 + self.dice.expovariate(1.0) * self.weather.latency_s

    def lost(self, one: str, other: str) -> bool:
        """Whether this message is."""
        if self.weather.cut and ((one, other) in self.weather.cut or (other, one) in self.weather.cut):
            return True
        return self.weather.loss > 0 and self.dice.random() < self.weather.loss


class Reply(NamedTuple):
    """Something that comes back from a server; the last of them carries the status."""

    code: grpc.StatusCode | None = None
    """None: there is more to come."""
    body: bytes | None = None
    text: str = ""
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    initial: tuple[tuple[str, str | bytes], ...] | None = None


class Server:
    """One process's port: handlers by method, behind an interceptor."""

    def __init__(self, network: Network, node: Node, service: str, interceptor: Any) -> None:
        self._network = network
        self._interceptor = interceptor
        self._handlers: dict[str, Any] = {}
        self._calls: dict[_Attempt, asyncio.Task[None]] = {}
        self.on_the_way: dict[_Attempt, None] = {}
        self._accepting = True
        self.node = node
        self.service = service
        self.as_grpc: Any = self
        """For generated code, which wants a server of gRPC's own."""
        self.listed = False
        """Whether channels think that it is up."""
        node.on_death.append(self._die)
        network.servers[service].append(self)

    def add_registered_method_handlers(self, service_name: str, handlers: Mapping[str, Any]) -> None:
        """What generated code calls to register a servicer."""
        self._handlers.update({f"/{service_name}/{name}": handler for name, handler in handlers.items()})

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """The older way of the same; generated code calls both."""

    def announce(self, listed: bool) -> None:
        """Channels learn of health a moment later."""
        loop = self._network.loop
        loop.post(loop.world, self._network.latency_s() * 10, self._list, listed)

    def _list(self, listed: bool) -> None:
        self.listed = listed and self.node.alive

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; give those under way `grace_s`, then cancel them."""
        self._accepting = False
        self.announce(False)
        if self._calls:
            await asyncio.wait(self._calls.values(), timeout=grace_s)
        for task in list(self._calls.values()):
            task.cancel()
        for attempt in list(self._calls):
            attempt.reset()

    def receive(self, attempt: _Attempt, body: bytes) -> None:
        """A request arrived."""
        self.on_the_way.pop(attempt, None)
        if not self._accepting:
            attempt.reset()
            return
        self._network.attempts[self.service] += 1
        task = self._network.loop.create_task(self._serve(attempt, body))
        self._calls[attempt] = task
        task.add_done_callback(lambda _: self._calls.pop(attempt, None))

    def cancel(self, attempt: _Attempt) -> None:
        """The caller gave up."""
        if task := self._calls.get(attempt):
            task.cancel()

    async def _serve(self, attempt: _Attempt, body: bytes) -> None:
        served_until.set(attempt.deadline)
        context = Context(attempt, self._network.loop)
        details = _Details(attempt.method, attempt.metadata)
        try:
            handler = await self._interceptor.intercept_service(self._find, details)
            request = handler.request_deserializer(body)
            if handler.unary_unary:
                response = await handler.unary_unary(request, context)
                attempt.back(context.last(handler.response_serializer(response)))
            else:
                async for response in handler.unary_stream(request, context):
                    attempt.back(Reply(body=handler.response_serializer(response)))
                attempt.back(context.last())
        except grpc.aio.AbortError:
            attempt.back(context.last())
        except asyncio.CancelledError:
            context.set_code(grpc.StatusCode.CANCELLED)
            attempt.back(context.last())

    async def _find(self, details: _Details) -> Any:
        return self._handlers[details.method]

    def _die(self) -> None:
        self._network.servers[self.service].remove(self)
        for attempt in [*self._calls, *self.on_the_way]:
            attempt.reset()


@dataclass(frozen=True)
class _Details:
    method: str
    invocation_metadata: Sequence[tuple[str, str | bytes]]


class Context:
    """What a handler is told of its call (the part of grpc.aio.ServicerContext that ours use)."""

    def __init__(self, attempt: _Attempt, loop: VirtualLoop) -> None:
        self._attempt = attempt
        self._loop = loop
        self.status = OK
        self.text = ""
        self.trailing: tuple[tuple[str, str | bytes], ...] = ()

    def last(self, body: bytes | None = None) -> Reply:
        """The last word of the call."""
        return Reply(self.status, body if self.status is OK else None, self.text, self.trailing)

    async def send_initial_metadata(self, initial: Iterable[tuple[str, str | bytes]]) -> None:
        """Ahead of the first answer."""
        self._attempt.back(Reply(initial=tuple(initial)))

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        """What the caller sent."""
        return self._attempt.metadata

    def time_remaining(self) -> float | None:
        """Seconds left; None without a deadline."""
        deadline = self._attempt.deadline
        return None if deadline >= FAR_S else max(0.0, deadline - self._loop.now_s)

    def set_code(self, code: grpc.StatusCode) -> None:
        """The status to answer with."""
        self.status = code

    def set_details(self, text: str) -> None:
        """Its text."""
        self.text = text

    def set_trailing_metadata(self, trailing: Iterable[tuple[str, str | bytes]]) -> None:
        """What goes with it."""
        self.trailing = tuple(trailing)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[tuple[str, str | bytes]] = ()
    ) -> None:
        """End the call with an error."""
        self.status, self.text, self.trailing = code, details, tuple(trailing_metadata)
        raise grpc.aio.AbortError

    def peer(self) -> str:
        """Who calls."""
        return f"sim:{self._attempt.channel.node.name}"


class Channel:
    """A channel from one node to the replicas of a service.

    retry  as in the service config; None: the caller repeats calls itself.
    interceptors  real ones, of grpc.aio.
    """

    def __init__(
        self, network: Network, node: Node, service: str, retry: Retry | None = None, interceptors: Sequence[Any] = ()
    ) -> None:
        self.network = network
        self.node = node
        self.service = service
        self.retry = retry
        self._tokens = retry.tokens_max if retry else 0.0
        self._interceptors = interceptors
        self.caller = node.name.split("-")[0]
        self._turn = network.dice.randrange(100)

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None, _registered_method: bool = False) -> Callable[..., UnaryCall]:  # noqa: E501  # fmt: skip
        """What generated stubs call."""

        def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> UnaryCall:
            def plain(timeout: float | None, metadata: Any) -> UnaryCall:
                return UnaryCall(self, method, request_serializer(request), response_deserializer, timeout, metadata)

            if not self._interceptors:
                return plain(timeout, metadata)

            async def going_on(details: Any, _: Any) -> UnaryCall:
                return plain(details.timeout, details.metadata)

            details = grpc.aio.ClientCallDetails(method, timeout, metadata, None, None)
            work = self._interceptors[0].intercept_unary_unary(going_on, details, request)
            return _Intercepted(self.network.loop.create_task(work))

        return call

    def unary_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None, _registered_method: bool = False) -> Callable[..., StreamCall]:  # noqa: E501  # fmt: skip
        """What generated stubs call."""

        def call(request: Any, *, timeout: float | None = None, metadata: Any = None, **_: Any) -> StreamCall:
            return StreamCall(self, method, request_serializer(request), response_deserializer, timeout, metadata)

        return call

    async def close(self, grace: float | None = None) -> None:
        """Nothing is held open."""

    def pick(self) -> Server | None:
        """The next server in turn that is believed to be up."""
        listed = [server for server in self.network.servers[self.service] if server.listed]
        self._turn += 1
        return listed[self._turn % len(listed)] if listed else None

    def may_retry(self, code: grpc.StatusCode, attempt: int) -> bool:
        """Whether gRPC itself tries again, after attempt number `attempt` ended so. Counts the tokens."""
        if self.retry is None:
            return False
        if code not in self.retry.codes:
            if code is OK:
                self._tokens = min(self.retry.tokens_max, self._tokens + self.retry.token_ratio)
            return False
        self._tokens = max(0.0, self._tokens - 1)
        return attempt < self.retry.attempts_max and self._tokens > self.retry.tokens_max / 2


class _Attempt:
    """One try of a call at one server. Everything from the server reaches `sink` on the caller's node, later."""

    __slots__ = ("_broken", "_ordered_until", "_sink", "channel", "deadline", "metadata", "method", "server")

    def __init__(
        self, channel: Channel, server: Server, method: str, deadline: float,
        metadata: Sequence[tuple[str, str | bytes]], sink: _Sink,
    ) -> None:  # fmt: skip
        self.channel = channel
        self.server = server
        self.method = method
        self.deadline = deadline
        self.metadata = metadata
        self._sink = sink
        self._ordered_until = 0.0
        self._broken = False

    def send(self, body: bytes) -> None:
        """On its way to the server, perhaps twice, perhaps never."""
        network, server = self.channel.network, self.server
        if not server.node.alive:
            self.reset()
            return
        if network.lost(self.channel.caller, self.channel.service):
            self._lose()
            return
        self._post(body)
        if network.weather.duplicates and network.dice.random() < network.weather.duplicates:
            _Attempt(self.channel, server, self.method, self.deadline, self.metadata, _deaf)._post(body)

    def _post(self, body: bytes) -> None:
        self.server.on_the_way[self] = None
        self.channel.network.loop.post(
            self.server.node, self.channel.network.latency_s(), self.server.receive, self, body
        )

    def back(self, reply: Reply) -> None:
        """On its way to the caller; the parts of one answer keep their order, whatever overtakes what elsewhere."""
        network = self.channel.network
        if self._broken:
            return
        if network.lost(self.channel.service, self.channel.caller):
            self._lose()
            return
        at = max(self._ordered_until, network.loop.now_s + network.latency_s())
        self._ordered_until = at + 1e-6
        network.loop.post(self.channel.node, at - network.loop.now_s, self._sink, reply)

    def reset(self) -> None:
        """The connection broke: the process is gone or does not listen."""
        network = self.channel.network
        network.loop.post(
            self.channel.node, network.latency_s(), self._sink, Reply(UNAVAILABLE, text="connection reset")
        )

    def cancel(self) -> None:
        """Tell the server that nobody waits any more."""
        network = self.channel.network
        if self.server.node.alive:
            network.loop.post(self.server.node, network.latency_s(), self.server.cancel, self)

    def _lose(self) -> None:
        """Mostly the connection breaks and both sides notice; sometimes nobody does until keepalive finds out."""
        self._broken = True
        network = self.channel.network
        wait_s = 0.0 if network.dice.random() < 0.7 else KEEPALIVE_S
        network.loop.post(network.loop.world, wait_s, self.reset)
        network.loop.post(network.loop.world, wait_s, self.cancel)


_Sink = Callable[[Reply], None]


def _deaf(_: Reply) -> None:
    """Nobody waits for the answer to a duplicate."""


class _Call:
    """What both kinds of calls share."""

    def __init__(
        self, channel: Channel, method: str, body: bytes, deserialise: Any, timeout: float | None, metadata: Any
    ) -> None:
        self._channel = channel
        self._loop = channel.network.loop
        self._method = method
        self._body = body
        self._deserialise = deserialise
        self._metadata = [(key, value) for key, value in metadata or ()]
        self._deadline = self._loop.now_s + timeout if timeout is not None else FAR_S
        if channel.retry and self._deadline > self._loop.now_s + HOP_S_MAX:
            channel.network.observer.violate("deadlines_are_kept", "", f"{method} has no deadline to speak of")
        until = served_until.get()
        if until is not None and self._deadline > max(until, self._loop.now_s) + 1e-6 and until < FAR_S:
            text = f"{method} may take until {self._deadline:.3f}, and its caller waits until {until:.3f}"
            channel.network.observer.violate("deadlines_are_kept", "", text)
        self._attempts = asked_for.get()
        self._end = Reply()

    async def trailing_metadata(self) -> Metadata:
        """What came with the end."""
        return Metadata(*self._end.trailing)

    async def code(self) -> grpc.StatusCode:
        """How it ended; UNKNOWN while it has not."""
        return self._end.code or grpc.StatusCode.UNKNOWN

    async def details(self) -> str:
        """Its text."""
        return self._end.text

    def _start(self, sink: _Sink) -> _Attempt | None:
        server = self._channel.pick()
        if server is None:
            sink(Reply(UNAVAILABLE, text=f"no {self._channel.service} is up"))
            return None
        if self._attempts is not None:
            self._attempts[0] += 1
        attempt = _Attempt(self._channel, server, self._method, self._deadline, self._metadata, sink)
        attempt.send(self._body)
        return attempt

    def _error(self) -> AioRpcError:
        end = self._end
        return AioRpcError(end.code or grpc.StatusCode.UNKNOWN, Metadata(), Metadata(*end.trailing), end.text)


_LATE = Reply(grpc.StatusCode.DEADLINE_EXCEEDED, text="deadline exceeded")


class UnaryCall(_Call):
    """A call with one answer; await it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(_noticed)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    async def initial_metadata(self) -> Metadata:
        """Nothing: what a handler sends ahead is shown by streams only."""
        return Metadata()

    def cancel(self) -> bool:
        """Give up."""
        return self._task.cancel()

    def done(self) -> bool:
        """Whether it is over."""
        return self._task.done()

    async def _run(self) -> Any:
        number = 0
        while True:
            number += 1
            self._end = await self._once()
            assert self._end.code is not None
            again = self._channel.may_retry(self._end.code, number)
            if self._end.code is OK:
                return self._deserialise(self._end.body)
            if not again:
                raise self._error()
            await self._pause(number, self._end.trailing)

    async def _once(self) -> Reply:
        future: asyncio.Future[Reply] = self._loop.create_future()

        def sink(reply: Reply) -> None:
            if reply.code is not None and not future.done():
                future.set_result(reply)

        if self._deadline <= self._loop.now_s:
            return _LATE
        timer: Handle | None = None
        if self._deadline < FAR_S:
            timer = self._loop.call_at(self._deadline, sink, _LATE)
        attempt = self._start(sink)
        try:
            reply = await future
        except asyncio.CancelledError:
            if attempt:
                attempt.cancel()
            raise
        finally:
            if timer:
                timer.cancel()
        if reply is _LATE and attempt:
            attempt.cancel()
        return reply

    async def _pause(self, number: int, trailing: Any) -> None:
        retry, dice = self._channel.retry, self._channel.network.dice
        assert retry is not None
        wait_s = min(retry.most_s, retry.first_s * retry.factor ** (number - 1)) * dice.uniform(0.8, 1.2)
        for key, value in trailing:
            if key == "grpc-retry-pushback-ms":
                wait_s = float(value) / 1000
        future = self._loop.create_future()
        # As gRPC: a wait that would outlast the deadline ends there.
        self._loop.call_at(min(self._deadline, self._loop.now_s + wait_s), _wake, future)
        await future


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _noticed(task: asyncio.Task[Any]) -> None:
    """A call may fail after its caller has gone: that is nobody's bug."""
    if not task.cancelled():
        task.exception()


class _Intercepted(UnaryCall):
    """A call that an interceptor makes."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        task.add_done_callback(_noticed)


class StreamCall(_Call):
    """A call with many answers, or one that is waited for; iterate over it, or read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._arrived: asyncio.Queue[Reply] = asyncio.Queue()
        self._headers: asyncio.Future[Metadata] = self._loop.create_future()
        self._over = False
        if self._deadline < FAR_S:
            self._loop.call_at(self._deadline, self._arrive, _LATE)
        self._attempt = self._start(self._arrive)

    def _arrive(self, reply: Reply) -> None:
        if not self._headers.done():
            self._headers.set_result(Metadata(*(reply.initial or ())))
        if reply.initial is None:
            self._arrived.put_nowait(reply)

    async def initial_metadata(self) -> Metadata:
        """As soon as they come, with the first answer or before."""
        return await asyncio.shield(self._headers)

    async def read(self) -> Any:
        """The next answer, EOF after the last. Raises AioRpcError."""
        while not self._over:
            reply = await self._arrived.get()
            if reply.code is not None:
                self._over, self._end = True, reply
            if reply.body is not None:
                return self._deserialise(reply.body)
        if self._end.code is not OK:
            raise self._error()
        return grpc.aio.EOF

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (answer := await self.read()) is not grpc.aio.EOF:
            yield answer

    def cancel(self) -> bool:
        """Give up."""
        if self._attempt and not self._over:
            self._attempt.cancel()
        return True
