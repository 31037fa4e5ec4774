"""Submits that are under way at the same time share a call: for the mesh a call costs more than what it brings.

A caller with a few under way notices nothing: each goes alone, at once. From CROWD on, new ones wait for company,
LINGER_S at most, and go as one BatchSubmitApplications. Nothing else changes: each submit keeps its own permit,
deadline, retries, trace and answer. Where some are decided and others are not, the answer does not wait for those; they
go on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from google.rpc import code_pb2
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.transport import SUBMIT, SUBMIT_MANY, Failure, Metadata, Method, Reply, Req, Res, Transport
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.tracing import is_kept

CROWD = 4
"""Submits under way from which on the next one waits for company. With 8, fifty small callers hardly shared any."""
LINGER_S = 0.004
"""For how long at most. Intake itself leaves 8 ms between two commits when it has much to do."""
ITEMS_MAX = 64
"""Submits a call, and half of those under way at most: else mesh and caller would wait for each other in turns. With 64
under way a call for 32 costs the mesh 1.05 ms an application, one for 16 1.12 ms, 64 calls 1.6 ms."""
ITEM_BYTES_MAX = 16 * 1024
"""Larger ones go alone, so that no call comes near the longest message."""
ALIKE_S = 0.25
"""Submits share a call where their times to wait differ by less."""
HURRY_S = 0.1
"""With so little time left, a submit does not wait for company."""
WAIT_S_LEAST = 0.05
"""An undecided one goes on alone where its caller waits for so long yet."""
_OWN = frozenset({"traceparent", "tracestate"})
_NOT_FOR_US = frozenset({"PERMISSION_DENIED", "UNIMPLEMENTED"})


class _Item(NamedTuple):
    request: pb.SubmitApplicationRequest
    traceparent: str
    timeout_s: float
    acknowledge_s: float
    acknowledged: Callable[[float | None], None] | None
    answer: asyncio.Future[Reply[pb.SubmitApplicationResponse]]


class _Group:
    """Submits that will share a call."""

    def __init__(self, metadata: Metadata, timer: asyncio.TimerHandle) -> None:
        self.items: list[_Item] = []
        self.metadata = metadata
        self.timer = timer
        self.left = 0
        """Of which their callers still wait."""
        self.call: asyncio.Task[None] | None = None


class Together:
    """A Transport over another one. For one event loop.

    crowd  submits under way from which on new ones share calls.
    """

    def __init__(self, transport: Transport, clock: Clock, crowd: int = CROWD) -> None:
        self._transport = transport
        self._clock = clock
        self._crowd = crowd
        self._under_way = 0
        self._open: dict[Any, _Group] = {}
        self._allowed = True

    async def unary(self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata) -> Reply[Res]:
        """See Transport."""
        if method is not SUBMIT:
            return await self._transport.unary(method, request, timeout_s, metadata)
        submit: Any = request
        with self._one_more():
            if self._goes_alone(submit, timeout_s, metadata):
                return await self._transport.unary(method, request, timeout_s, metadata)
            shared: Any = await self._share(submit, timeout_s, metadata, timeout_s, None)
            return shared or await self._transport.unary(method, request, timeout_s, metadata)

    async def waiting(
        self,
        method: Method[Req, Res],
        request: Req,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
    ) -> Reply[Res]:
        """See Transport."""
        if method is not SUBMIT:
            return await self._transport.waiting(method, request, timeout_s, metadata, acknowledge_s, acknowledged)
        began = self._clock.monotonic()
        submit: Any = request
        with self._one_more():
            shared: Any = None
            if not self._goes_alone(submit, timeout_s, metadata):
                shared = await self._share(submit, timeout_s, metadata, acknowledge_s, acknowledged)
            if shared:
                took_s = self._clock.monotonic() - began
                left_s = submit.wait.ToNanoseconds() / 1e9 - took_s
                if shared.response.application.state != pb.Application.STATE_PENDING or left_s < WAIT_S_LEAST:
                    answer: Reply[Res] = shared
                    return answer
                # It is stored; what is left is only waiting.
                acknowledged(shared.queue_s)
                submit.wait.FromNanoseconds(round(left_s * 1e9))
                timeout_s -= took_s
            return await self._transport.waiting(method, request, timeout_s, metadata, acknowledge_s, acknowledged)

    def stream(
        self, method: Method[Req, Res], request: Req, metadata: Metadata
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Res]]:
        """See Transport."""
        return self._transport.stream(method, request, metadata)

    async def close(self) -> None:
        """See Transport."""
        await self._transport.close()

    @contextlib.contextmanager
    def _one_more(self) -> Any:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def _goes_alone(self, submit: pb.SubmitApplicationRequest, timeout_s: float, metadata: Metadata) -> bool:
        """Where nobody is there to go with, no time to wait for them, or where it would not be the same: who is traced
        in full sees every hop."""
        return (
            self._under_way <= self._crowd
            or timeout_s < HURRY_S
            or not self._allowed
            or is_kept(_said(metadata, "traceparent"))
            or submit.ByteSize() > ITEM_BYTES_MAX
        )

    async def _share(
        self,
        submit: pb.SubmitApplicationRequest,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None] | None,
    ) -> Reply[pb.SubmitApplicationResponse] | None:
        """The answer of a shared call; None where there is none for it, and it has to go alone."""
        loop = asyncio.get_running_loop()
        waits = round(submit.wait.ToNanoseconds() / 1e9 / ALIKE_S)
        key = submit.parent, submit.application.priority, waits, round(acknowledge_s / ALIKE_S)
        group = self._open.get(key)
        if group is None:
            group = self._open[key] = _Group(metadata, loop.call_later(LINGER_S, self._send, key))
        # The newest one's, which says best when the call was sent.
        group.metadata = metadata
        answer: asyncio.Future[Reply[pb.SubmitApplicationResponse]] = loop.create_future()
        traceparent = _said(metadata, "traceparent")
        group.items.append(_Item(submit, traceparent, timeout_s, acknowledge_s, acknowledged, answer))
        group.left += 1
        if len(group.items) >= min(ITEMS_MAX, max(2, self._under_way // 2)):
            self._send(key)
        too_late = loop.call_later(timeout_s, _give_up, answer, timeout_s)
        try:
            return await answer
        except _Alone:
            return None
        finally:
            too_late.cancel()
            group.left -= 1
            if not group.left and group.call:
                group.call.cancel()  # Nobody waits for it any more.
            del answer, group  # What it raised leads back here: a cycle, for the collector, of each call that fails.

    def _send(self, key: Any) -> None:
        group = self._open.pop(key)
        group.timer.cancel()
        group.items = [item for item in group.items if not item.answer.done()]
        if group.items:
            group.call = asyncio.create_task(self._call(group))

    async def _call(self, group: _Group) -> None:
        items = group.items
        if len(items) == 1:
            _fail(items[0].answer, _Alone())
            return
        try:
            reply = await self._ask(group)
            for item, result in zip(items, reply.response.results, strict=True):
                if result.error.code != code_pb2.OK:
                    _fail(item.answer, Failure.of(result.error))
                elif not item.answer.done():
                    response = pb.SubmitApplicationResponse()
                    response.application.CopyFrom(result.application)
                    item.answer.set_result(Reply(response, reply.queue_s))
        except Failure as failure:
            self._allowed = self._allowed and failure.code not in _NOT_FOR_US
            for item in items:
                _fail(item.answer, failure.again() if self._allowed else _Alone())
        except Exception as error:  # noqa: BLE001  Each caller is handed it: they would wait for nothing else.
            for item in items:
                _fail(item.answer, error)

    async def _ask(self, group: _Group) -> Reply[pb.BatchSubmitApplicationsResponse]:
        items = group.items
        request = pb.BatchSubmitApplicationsRequest(parent=items[0].request.parent)
        for item in items:
            one = request.requests.add()
            one.CopyFrom(item.request)
            one.ClearField("wait")
            one.traceparent = item.traceparent
        timeout_s = max(item.timeout_s for item in items)
        metadata = tuple(pair for pair in group.metadata if pair[0] not in _OWN)
        wait = min((item.request.wait for item in items), key=lambda one: one.ToNanoseconds())
        if not wait.ToNanoseconds():
            return await self._transport.unary(SUBMIT_MANY, request, timeout_s, metadata)
        request.wait.CopyFrom(wait)

        def acknowledged(queue_s: float | None) -> None:
            for item in items:
                if item.acknowledged and not item.answer.done():
                    item.acknowledged(queue_s)

        acknowledge_s = max(item.acknowledge_s for item in items)
        return await self._transport.waiting(SUBMIT_MANY, request, timeout_s, metadata, acknowledge_s, acknowledged)


class _Alone(Failure):
    """To be sent alone after all."""

    def __init__(self) -> None:
        super().__init__("UNKNOWN", "to be sent alone")


def _said(metadata: Metadata, name: str) -> str:
    return next((value for key, value in metadata if key == name), "")


def _fail(answer: asyncio.Future[Any], failure: Exception) -> None:
    if not answer.done():
        answer.set_exception(failure)


def _give_up(answer: asyncio.Future[Any], timeout_s: float) -> None:
    _fail(answer, Failure("DEADLINE_EXCEEDED", f"no answer within {timeout_s:.2g} s"))
