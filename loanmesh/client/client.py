"""Calls to intake, with request ids made for the caller and retries that are safe because of them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_delay

from loanmesh.runtime.clock import Clock, SystemClock, new_request_id

_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED})
CALL_S = 5.0
"""Longest time one attempt takes, besides the wait it asks for."""
T = TypeVar("T")


class CallFailed(Exception):
    """The mesh refused a call. `code` is the gRPC status name, `violations` the (field, rule) pairs it named."""

    def __init__(self, code: str, text: str, violations: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(text)
        self.code = code
        self.violations = violations


class Unreachable(Exception):
    """The mesh did not answer within the caller's patience. What was sent may have been stored: repeat it."""


class Client:
    """Speaks to one intake address on behalf of one lender.

    patience_s  how long to repeat a call that finds the mesh busy or away.
    client_id   who calls; request ids are unique per client.
    """

    def __init__(
        self,
        address: str,
        *,
        lender: str = "lenders/demo",
        client_id: str = "local",
        patience_s: float = 30.0,
        clock: Clock | None = None,
        dice: random.Random | None = None,
    ) -> None:
        self._lender = lender
        self._patience_s = patience_s
        self._clock = clock or SystemClock()
        self._dice = dice or random.Random()
        self._metadata = (("loanmesh-client", client_id),)
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.enable_retries", 0),  # Retries are ours alone, see `_call`.
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_receive_message_length", 32 * 1024 * 1024),
            ],
        )
        self._stub = IntakeServiceStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def submit(
        self, application: pb.Application, *, request_id: str | None = None, wait_s: float = 0.0
    ) -> pb.Application:
        """Store an application; wait up to `wait_s` seconds for its decision. A pending answer is a normal one."""
        wait = Duration(seconds=int(wait_s), nanos=int(wait_s % 1 * 1e9))
        request = pb.SubmitApplicationRequest(
            parent=self._lender, request_id=request_id or new_request_id(), application=application, wait=wait
        )
        answer = await self._call(lambda t: self._stub.SubmitApplication(request, timeout=t + wait_s, **self._meta))
        return answer.application

    async def submit_batch(
        self, applications: Sequence[tuple[str, pb.Application]]
    ) -> list[pb.Application | status_pb2.Status]:
        """Store up to 500 applications, each with its request_id; one answer each, in order."""
        request = pb.BatchSubmitApplicationsRequest(
            parent=self._lender,
            requests=[pb.SubmitApplicationRequest(request_id=key, application=a) for key, a in applications],
        )
        answer = await self._call(lambda t: self._stub.BatchSubmitApplications(request, timeout=t, **self._meta))
        return [r.application if r.WhichOneof("outcome") == "application" else r.error for r in answer.results]

    async def get(self, name: str) -> pb.Application:
        """One application."""
        request = pb.GetApplicationRequest(name=name)
        return (await self._call(lambda t: self._stub.GetApplication(request, timeout=t, **self._meta))).application

    async def list(
        self, *, filter: str = "", order_by: str = "", page_size: int = 0, page_token: str = ""
    ) -> pb.ListApplicationsResponse:
        """A page of the lender's applications."""
        request = pb.ListApplicationsRequest(
            parent=self._lender, filter=filter, order_by=order_by, page_size=page_size, page_token=page_token
        )
        return await self._call(lambda t: self._stub.ListApplications(request, timeout=t, **self._meta))

    async def watch(self, name: str) -> AsyncIterator[pb.Application]:
        """The application after each change until it is decided; takes up again when the connection breaks."""
        seen = 0
        while True:
            try:
                async for answer in self._stub.WatchApplication(pb.WatchApplicationRequest(name=name), **self._meta):
                    if answer.application.revision > seen:
                        seen = answer.application.revision
                        yield answer.application
                return
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AGAIN and error.code() != grpc.StatusCode.CANCELLED:
                    raise _failed(error) from error
                await self.get(name)  # Waits, within patience, until the mesh is back.

    async def explain(self, name: str, *, schedules: bool = False) -> pb.ExplainDecisionResponse:
        """Why it was decided so."""
        request = pb.ExplainDecisionRequest(name=name, include_schedules=schedules)
        return await self._call(lambda t: self._stub.ExplainDecision(request, timeout=t, **self._meta))

    async def history(self, name: str) -> pb.ListEventsResponse:
        """What happened to it."""
        request = pb.ListEventsRequest(parent=name, page_size=1000)
        return await self._call(lambda t: self._stub.ListEvents(request, timeout=t, **self._meta))

    async def accept(self, name: str, offer_id: str, *, request_id: str | None = None) -> pb.Application:
        """Accept an offer."""
        request = pb.AcceptOfferRequest(name=name, request_id=request_id or new_request_id(), offer_id=offer_id)
        return (await self._call(lambda t: self._stub.AcceptOffer(request, timeout=t, **self._meta))).application

    async def withdraw(self, name: str, *, request_id: str | None = None) -> pb.Application:
        """Withdraw an application."""
        request = pb.WithdrawApplicationRequest(name=name, request_id=request_id or new_request_id())
        answer = await self._call(lambda t: self._stub.WithdrawApplication(request, timeout=t, **self._meta))
        return answer.application

    async def supply(self, request: pb.SupplyInformationRequest) -> pb.Application:
        """Supply missing information; `request_id` is filled in where empty."""
        request.request_id = request.request_id or new_request_id()
        return (await self._call(lambda t: self._stub.SupplyInformation(request, timeout=t, **self._meta))).application

    @property
    def _meta(self) -> dict[str, Any]:
        return {"metadata": self._metadata}

    async def _call(self, attempt: Callable[[float], Awaitable[T]]) -> T:
        try:
            async for one in AsyncRetrying(
                retry=retry_if_exception(lambda e: isinstance(e, grpc.aio.AioRpcError) and e.code() in _AGAIN),
                stop=stop_after_delay(self._patience_s),
                wait=self._wait,
                sleep=self._clock.sleep,
                reraise=True,
            ):
                with one:
                    return await attempt(CALL_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _AGAIN:
                raise Unreachable(f"no answer within {self._patience_s:g} s: {error.code().name}") from error
            raise _failed(error) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _wait(self, state: RetryCallState) -> float:
        """What the server asked for, else a jittered backoff from 0.1 s to 2 s."""
        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, grpc.aio.AioRpcError):
            for key, value in error.trailing_metadata() or ():
                if key == "grpc-retry-pushback-ms":
                    return float(value) / 1000 * self._dice.uniform(1.0, 1.3)
        return min(2.0, 0.1 * 2.0 ** min(10, state.attempt_number - 1)) * self._dice.uniform(0.5, 1.0)


def _failed(error: grpc.aio.AioRpcError) -> CallFailed:
    violations: list[tuple[str, str]] = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            bad = error_details_pb2.BadRequest()
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(bad):
                    violations += [(v.field, v.description) for v in bad.field_violations]
    return CallFailed(error.code().name, error.details() or "", violations)
