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
from loanmesh.client.security import Bearer, Security
from loanmesh.runtime.channel import SERVICE_CONFIG, channel_options, make_channel, target_of
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.runtime.handshake import WORDS, Diagnosis
from loanmesh.runtime.setting_rules import stays_here
from loanmesh.runtime.status import code_of, error_info, is_too_large

QUEUE_MS = "loanmesh-queue-ms"
"""Metadata in which intake says how long a request queued before it was stored. As initial metadata it is also the
acknowledgement, ahead of the answer that still waits for a decision."""
SENT_MS = "loanmesh-sent-ms"
"""Metadata that tells intake when an attempt was sent and for how long we held it back, `SENDER:MS:HELD` by our
monotonic clock: so it knows the queue before its own door."""
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
    tls         the `error_type` where no connection came about because of TLS
    """

    progress = False
    tls = ""

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

    @property
    def reason(self) -> str:
        """Why the mesh refused, in the stable word of its ErrorInfo; '' where it said none."""
        info = error_info(self.details)
        return info.reason if info else ""

    @property
    def yields(self) -> bool:
        """Whether the mesh refused for the sake of those who are in more of a hurry."""
        info = error_info(self.details)
        return bool(info and info.metadata.get("yields_to"))

    def again(self) -> Failure:
        """The same, for another one whom it befell."""
        again = Failure(self.code, str(self), self.pushback_s, self.details)
        again.tls = self.tls
        return again

    def refusal(self) -> CallFailed:
        """As the caller gets it, where it is for good."""
        violations: list[tuple[str, str]] = []
        bad, info = error_details_pb2.BadRequest(), error_info(self.details)
        for detail in self.details.details:
            if detail.Unpack(bad):
                violations += [(v.field, v.description) for v in bad.field_violations]
        return CallFailed(self.code, str(self), violations, self.reason, dict(info.metadata) if info else {})


@dataclass(frozen=True, slots=True)
class Reply(Generic[Res]):
    """An answer, and how long the server says the request queued; None: it did not say."""

    response: Res
    queue_s: float | None


class Transport(Protocol):
    """Carries calls, each once: gRPC here, memory in a simulator. Failed ones raise Failure; a cancelled caller
    cancels the call."""

    async def unary(
        self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata, company: int = 1
    ) -> Reply[Res]:
        """One request, one answer. `company`: how many of its kind are sent in the same moment, itself included, that
        are to be one call where that can be."""
        ...

    async def waiting(
        self,
        method: Method[Req, Res],
        request: Req,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
        company: int = 1,
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
    """Over a channel of its own, to one address or several: health-checked round robin under outlier detection.

    security  how to prove who we are; None: no TLS, which a mesh answers on its own machine only.
    """

    def __init__(self, address: str, security: Security | None = None, clock: Clock | None = None) -> None:
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
        clock = clock or SystemClock()
        service, files, reload_s = "intake", None, 10.0
        if security:
            service, files, reload_s = security.server_name, security.files, security.reload_s
        target_of(address)  # What is no address is said first.
        if security is None and not stays_here(address):
            raise ValueError(
                f"{address} is not on this machine: give security=Security(...), since TLS is needed there"
            )
        channel = make_channel(address, service, files, clock, options=options, reload_s=reload_s)
        self._use(channel, Bearer(security.token if security else None), Diagnosis(service, files, clock))

    def _use(self, channel: grpc.aio.Channel, bearer: Bearer, diagnosis: Diagnosis | None) -> None:
        self._channel = channel
        self._bearer = bearer
        self._diagnosis = diagnosis
        self._calls: dict[tuple[str, bool], Any] = {}
        self._acknowledges_early = False

    async def unary(
        self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata, company: int = 1
    ) -> Reply[Res]:
        """See Transport."""
        call = self._callable(method, streaming=False)(request, timeout=timeout_s, metadata=self._signed(metadata))
        try:
            # Awaiting the call itself: only so does a cancelled caller cancel the server's work.
            response = await call
            return Reply(response, _queue_s(await call.initial_metadata(), await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from error

    async def waiting(
        self,
        method: Method[Req, Res],
        request: Req,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
        company: int = 1,
    ) -> Reply[Res]:
        """See Transport. Read as a stream of one answer, since only a stream shows initial metadata as they come."""
        call = self._callable(method, streaming=True)(request, timeout=timeout_s, metadata=self._signed(metadata))
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
                raise await self._failure(
                    grpc.aio.AioRpcError(
                        await call.code(),
                        await call.initial_metadata(),
                        await call.trailing_metadata(),
                        await call.details(),
                    )
                )
            return Reply(response, _queue_s(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from error
        finally:
            call.cancel()  # Ends it on the server too, where it is not at its end yet.

    @contextlib.asynccontextmanager
    async def stream(
        self, method: Method[Req, Res], request: Req, metadata: Metadata
    ) -> AsyncIterator[AsyncIterator[Res]]:
        """See Transport."""
        call = self._callable(method, streaming=True)(request, metadata=self._signed(metadata))
        try:
            yield self._answers(call)
        finally:
            call.cancel()

    async def close(self) -> None:
        """See Transport."""
        await self._channel.close()

    def _signed(self, metadata: Metadata) -> Metadata:
        return (*metadata, *self._bearer.metadata())

    async def _answers(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for answer in call:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise await self._failure(error) from error

    async def _failure(self, error: grpc.aio.AioRpcError) -> Failure:
        failure = _failure(error)
        if self._diagnosis is None or failure.code != "UNAVAILABLE":
            return failure
        if cause := await self._diagnosis.cause(str(failure)):
            failure = Failure(failure.code, WORDS[cause], failure.pushback_s, failure.details)
            failure.tls = cause
        return failure

    def _callable(self, method: Method[Req, Res], streaming: bool) -> Any:
        key = (method.name, streaming)
        if key not in self._calls:
            make = self._channel.unary_stream if streaming else self._channel.unary_unary
            self._calls[key] = make(
                f"/{method.full_name}", method.request.SerializeToString, method.response.FromString
            )
        return self._calls[key]


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
