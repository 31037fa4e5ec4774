"""Calls to intake over gRPC, each sent once. The only module of the client that knows gRPC.

Nothing is repeated here, and gRPC's own retries are off: `calls.py` repeats, and nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.errors import CallFailed
from loanmesh.runtime.channel import SERVICE_CONFIG, channel_options, target_of
from loanmesh.runtime.status import code_of, is_too_large

QUEUE_MS = "loanmesh-queue-ms"
"""Metadata in which intake says how long a request queued before it was stored. As initial metadata it is also the
acknowledgement, ahead of the answer that still waits for a decision."""
SENT_MS = "loanmesh-sent-ms"
"""Metadata that tells intake when an attempt was sent, `SENDER:MS` by our monotonic clock: so it knows the queue before
its own door."""
PUSHBACK_MS = "grpc-retry-pushback-ms"
SERVICE = "lending.intake.v1.IntakeService"

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """One rpc of intake."""

    name: str
    request: type[Req]
    response: type[Res]

    @property
    def full_name(self) -> str:
        """As in `rpc.method`."""
        return f"{SERVICE}/{self.name}"


SUBMIT = Method("SubmitApplication", pb.SubmitApplicationRequest, pb.SubmitApplicationResponse)
SUBMIT_MANY = Method("BatchSubmitApplications", pb.BatchSubmitApplicationsRequest, pb.BatchSubmitApplicationsResponse)
GET = Method("GetApplication", pb.GetApplicationRequest, pb.GetApplicationResponse)
LIST = Method("ListApplications", pb.ListApplicationsRequest, pb.ListApplicationsResponse)
WATCH = Method("WatchApplication", pb.WatchApplicationRequest, pb.WatchApplicationResponse)
EXPLAIN = Method("ExplainDecision", pb.ExplainDecisionRequest, pb.ExplainDecisionResponse)
REPLAY = Method("ReplayDecision", pb.ReplayDecisionRequest, pb.ReplayDecisionResponse)
HISTORY = Method("ListEvents", pb.ListEventsRequest, pb.ListEventsResponse)
ACCEPT = Method("AcceptOffer", pb.AcceptOfferRequest, pb.AcceptOfferResponse)
WITHDRAW = Method("WithdrawApplication", pb.WithdrawApplicationRequest, pb.WithdrawApplicationResponse)
SUPPLY = Method("SupplyInformation", pb.SupplyInformationRequest, pb.SupplyInformationResponse)


class Failure(Exception):
    """One attempt failed.

    code        name of the gRPC status
    pushback_s  seconds before which the server wants no other try; negative: none at all; None: it did not say
    progress    whether a part of what was asked is done all the same
    """

    progress = False

    def __init__(
        self,
        code: str,
        text: str,
        pushback_s: float | None = None,
        details: status_pb2.Status | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.pushback_s = pushback_s
        self.details = details or status_pb2.Status()

    @classmethod
    def of(cls, status: status_pb2.Status) -> Failure:
        """The failure that an item's status tells."""
        return cls(code_of(status).name, status.message, _retry_s(status), status)

    def refusal(self) -> CallFailed:
        """As the caller gets it, where it is for good."""
        violations: list[tuple[str, str]] = []
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        reason, metadata = "", {}
        for detail in self.details.details:
            if detail.Unpack(bad):
                violations += [(v.field, v.description) for v in bad.field_violations]
            elif detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
        return CallFailed(self.code, str(self), violations, reason, metadata)


@dataclass(frozen=True, slots=True)
class Reply(Generic[Res]):
    """An answer, and how long the server says the request queued; None: it did not say."""

    response: Res
    queue_s: float | None


class Transport(Protocol):
    """Carries calls, each once: gRPC here, memory in a simulator. Failed ones raise Failure; a cancelled caller
    cancels the call."""

    async def unary(self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata) -> Reply[Res]:
        """One request, one answer."""
        ...

    async def waiting(
        self,
        method: Method[Req, Res],
        request: Req,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
    ) -> Reply[Res]:
        """The same for a request that waits for more than being stored. Calls `acknowledged` with the queue time as
        soon as the server says that it is stored; a server known to say so that does not within `acknowledge_s` has
        failed (DEADLINE_EXCEEDED)."""
        ...

    def stream(
        self, method: Method[Req, Res], request: Req, metadata: Metadata
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Res]]:
        """One request, many answers, until the stream is left."""
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


class GrpcTransport:
    """Over a channel of its own, to one address or several: health-checked round robin under outlier detection."""

    def __init__(self, address: str) -> None:
        config = {k: v for k, v in SERVICE_CONFIG.items() if k in ("loadBalancingConfig", "healthCheckConfig")}
        options = [
            *channel_options(config),
            ("grpc.enable_retries", 0),
            # A watch is silent for long; a host that hangs is noticed by this only. Servers allow one ping in 10 s.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # The one that counts once a ping is on its way; a minute by default.
            ("grpc.http2.ping_timeout_ms", 5_000),
        ]
        self._channel = grpc.aio.insecure_channel(target_of(address), options=options)
        self._calls: dict[tuple[str, bool], Any] = {}
        self._acknowledges_early = False

    async def unary(self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata) -> Reply[Res]:
        """See Transport."""
        call = self._callable(method, streaming=False)(request, timeout=timeout_s, metadata=metadata)
        try:
            # Awaiting the call itself: only so does a cancelled caller cancel the server's work.
            response = await call
            return Reply(response, _queue_s(await call.initial_metadata(), await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error

    async def waiting(
        self,
        method: Method[Req, Res],
        request: Req,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
    ) -> Reply[Res]:
        """See Transport. Read as a stream of one answer, since only a stream shows initial metadata as they come."""
        call = self._callable(method, streaming=True)(request, timeout=timeout_s, metadata=metadata)
        try:
            try:
                async with asyncio.timeout(acknowledge_s if self._acknowledges_early else None):
                    queue_s = _queue_s(await call.initial_metadata())
            except TimeoutError:
                raise Failure("DEADLINE_EXCEEDED", f"not stored within {acknowledge_s:g} s") from None
            if queue_s is not None:
                self._acknowledges_early = True
                acknowledged(queue_s)
            response = await call.read()
            if response is grpc.aio.EOF:
                raise _failure(
                    grpc.aio.AioRpcError(
                        await call.code(),
                        await call.initial_metadata(),
                        await call.trailing_metadata(),
                        await call.details(),
                    )
                )
            return Reply(response, _queue_s(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from error
        finally:
            call.cancel()  # Ends it on the server too, where it is not at its end yet.

    @contextlib.asynccontextmanager
    async def stream(
        self, method: Method[Req, Res], request: Req, metadata: Metadata
    ) -> AsyncIterator[AsyncIterator[Res]]:
        """See Transport."""
        call = self._callable(method, streaming=True)(request, metadata=metadata)
        try:
            yield _answers(call)
        finally:
            call.cancel()

    async def close(self) -> None:
        """See Transport."""
        await self._channel.close()

    def _callable(self, method: Method[Req, Res], streaming: bool) -> Any:
        key = (method.name, streaming)
        if key not in self._calls:
            make = self._channel.unary_stream if streaming else self._channel.unary_unary
            self._calls[key] = make(
                f"/{method.full_name}", method.request.SerializeToString, method.response.FromString
            )
        return self._calls[key]


async def _answers(call: Any) -> AsyncIterator[Any]:
    try:
        async for answer in call:
            yield answer
    except grpc.aio.AioRpcError as error:
        raise _failure(error) from error


def _failure(error: grpc.aio.AioRpcError) -> Failure:
    code, text, pushback_s, details = error.code().name, error.details() or "", None, status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == PUSHBACK_MS:
            with contextlib.suppress(ValueError):  # Nonsense from a server is as good as nothing.
                pushback_s = float(value) / 1000
        elif key == "grpc-status-details-bin" and isinstance(value, bytes):
            details = status_pb2.Status.FromString(value)
    if pushback_s is None:
        pushback_s = _retry_s(details)
    if is_too_large(error.code(), text):
        # No overload, though it looks like one; the same message fails again.
        code = "INVALID_ARGUMENT"
    return Failure(code, text, pushback_s, details)


def _retry_s(status: status_pb2.Status) -> float | None:
    info = error_details_pb2.RetryInfo()
    return next((info.retry_delay.ToNanoseconds() / 1e9 for detail in status.details if detail.Unpack(info)), None)


def _queue_s(*metadata: Any) -> float | None:
    for key, value in itertools.chain(*metadata):
        if key == QUEUE_MS:
            with contextlib.suppress(ValueError):
                return max(0.0, float(value) / 1000)
    return None
