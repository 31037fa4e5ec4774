"""Submits that are under way at the same time share a call: for the mesh a call costs more than what it brings.

A caller with a few under way notices nothing: each goes alone, at once. From a crowd on, new ones wait for company,
LINGER_S at most, and go as one BatchSubmitApplications. Nothing else changes: each submit keeps its own permit,
deadline, retries, trace and answer. Where some are decided and others are not, the answer does not wait for those:
they are stored, and are watched.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple

from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.calls import AGAIN
from loanmesh.client.transport import SUBMIT, SUBMIT_MANY, WATCH, Failure, Metadata, Method, Reply, Req, Res, Transport
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.throttle import COMPANY
from loanmesh.runtime.tracing import is_kept

CROWD = 4
"""Submits of a class under way from which on the next one waits for company. With 8, fifty small callers hardly shared
any."""
LINGER_S = 0.004
"""For how long at most. Intake itself leaves 8 ms between two commits when it has much to do."""
ITEMS_MAX = 64
"""Submits a call, and half of those under way at most: else mesh and caller would wait for each other in turns. With 64
under way a call for 32 costs the mesh 1.05 ms an application, one for 16 1.12 ms, 64 calls 1.6 ms."""
ITEM_BYTES_MAX = 8 * 1024
"""Larger ones go alone, so that no call comes near the longest message (a MiB for callers with tokens)."""
APART_MOST, APART_WEIGHT = 0.25, 0.05
"""Where more than this share of submits cannot share a call, none get a place together: it would be one call each. And
the weight of the newest one in that share."""
HURRY_S = 0.1
"""With so little time left, a submit does not wait for company."""
ALIKE_S = 0.25
"""Submits share a call where their times to wait differ by less, and those to be stored by less than twofold."""
WAIT_S_LEAST = 0.05
"""An undecided one is watched where its caller waits for so long yet."""
_NOT_FOR_US = frozenset({"PERMISSION_DENIED", "UNIMPLEMENTED"})
_Class = tuple[str, int]
"""Whose submits are counted together: lender and priority."""


class _Item(NamedTuple):
    request: pb.SubmitApplicationRequest
    traceparent: str
    timeout_s: float
    acknowledge_s: float
    acknowledged: Callable[[float | None], None]
    answer: asyncio.Future[Reply[pb.SubmitApplicationResponse]]


class _Group:
    """Submits that will share a call."""

    def __init__(self, metadata: Metadata, timer: asyncio.TimerHandle) -> None:
        self.items: list[_Item] = []
        self.metadata = metadata
        self.timer = timer
        self.waited = False
        """Whether the metadata are of one that got its turn together with others."""
        self.left = 0
        """Of which their callers still wait."""
        self.call: asyncio.Task[None] | None = None


class Together:
    """A Transport over another one. For one event loop.

    crowd  submits of a class under way from which on new ones share calls.
    """

    def __init__(self, transport: Transport, clock: Clock, crowd: int = CROWD) -> None:
        self._transport = transport
        self._clock = clock
        self._crowd = crowd
        self._under_way: Counter[_Class] = Counter()
        self._open: dict[Any, _Group] = {}
        self._allowed = True
        self._apart = 0.0
        """Share of the submits of late that cannot share a call."""

    async def unary(
        self, method: Method[Req, Res], request: Req, timeout_s: float, metadata: Metadata, company: int = 1
    ) -> Reply[Res]:
        """See Transport."""
        if method is not SUBMIT:
            return await self._transport.unary(method, request, timeout_s, metadata)
        submit: Any = request
        began = self._clock.monotonic()
        with self._counted(submit):
            if not self._goes_alone(submit, timeout_s, metadata, company):
                shared: Any = await self._share(submit, timeout_s, metadata, timeout_s, lambda _: None, company)
                if shared:
                    answer: Reply[Res] = shared
                    return answer
                self._note(apart=company > 1)
            return await self._transport.unary(method, request, self._left_s(timeout_s, began), metadata)

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
        """See Transport."""
        if method is not SUBMIT:
            return await self._transport.waiting(method, request, timeout_s, metadata, acknowledge_s, acknowledged)
        submit: Any = request
        began = self._clock.monotonic()
        with self._counted(submit) as stored:

            def heard(queue_s: float | None) -> None:
                stored()
                acknowledged(queue_s)

            if not self._goes_alone(submit, timeout_s, metadata, company):
                shared: Any = await self._share(submit, timeout_s, metadata, acknowledge_s, heard, company)
                if shared:
                    wait_s = self._left_s(submit.wait.ToNanoseconds() / 1e9, began)
                    if shared.response.application.state == pb.Application.STATE_PENDING and wait_s >= WAIT_S_LEAST:
                        heard(shared.queue_s)
                        shared = await self._watched(shared, wait_s, metadata)
                    answer: Reply[Res] = shared
                    return answer
                self._note(apart=company > 1)
            left_s = self._left_s(timeout_s, began)
            return await self._transport.waiting(method, request, left_s, metadata, acknowledge_s, heard)

    def stream(
        self, method: Method[Req, Res], request: Req, metadata: Metadata
    ) -> contextlib.AbstractAsyncContextManager[AsyncIterator[Res]]:
        """See Transport."""
        return self._transport.stream(method, request, metadata)

    @property
    def shares(self) -> bool:
        """Whether submits that get their turn together would go as one call."""
        return self._allowed and self._crowd <= COMPANY.ceiling and self._apart < APART_MOST

    async def close(self) -> None:
        """See Transport. Who waits for company is cancelled, as are those under way."""
        for group in self._open.values():
            group.timer.cancel()
            for item in group.items:
                item.answer.cancel()
        self._open.clear()
        await self._transport.close()

    def _left_s(self, seconds: float, since: float) -> float:
        return max(0.0, seconds - (self._clock.monotonic() - since))

    @contextlib.contextmanager
    def _counted(self, submit: pb.SubmitApplicationRequest) -> Iterator[Callable[[], None]]:
        """Counts a submit until it ends or is stored: one that only waits for its decision makes no crowd."""
        kind, counts = _class_of(submit), True
        self._under_way[kind] += 1

        def ended() -> None:
            nonlocal counts
            if counts:
                counts = False
                self._under_way[kind] -= 1

        try:
            yield ended
        finally:
            ended()

    def _goes_alone(
        self, submit: pb.SubmitApplicationRequest, timeout_s: float, metadata: Metadata, company: int
    ) -> bool:
        """Where nobody is there to go with, no time to wait for them, or where it would not be the same: who is traced
        in full sees every hop."""
        apart = timeout_s < HURRY_S or is_kept(_said(metadata, "traceparent")) or submit.ByteSize() > ITEM_BYTES_MAX
        self._note(apart=apart)
        crowded = company > 1 or self._under_way[_class_of(submit)] > self._crowd
        return apart or not crowded or not self._allowed

    def _note(self, *, apart: bool) -> None:
        self._apart += (apart - self._apart) * APART_WEIGHT

    async def _share(
        self,
        submit: pb.SubmitApplicationRequest,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
        company: int,
    ) -> Reply[pb.SubmitApplicationResponse] | None:
        """The answer of a shared call; None where there is none for it, and it has to go alone."""
        loop = asyncio.get_running_loop()
        kind = _class_of(submit)
        wait_s = submit.wait.ToNanoseconds() / 1e9
        key = kind, round(wait_s / ALIKE_S), math.floor(math.log2(max(acknowledge_s, HURRY_S)))
        group = self._open.get(key)
        if group is None:
            group = self._open[key] = _Group(metadata, loop.call_later(LINGER_S, self._send, key))
        if not group.waited:
            # The newest one's, which says best when the call was sent; where several got their turn together, that of
            # the first of them, which was held back for longest.
            group.metadata = metadata
            group.waited = company > 1
        answer: asyncio.Future[Reply[pb.SubmitApplicationResponse]] = loop.create_future()
        traceparent = _said(metadata, "traceparent")
        group.items.append(_Item(submit, traceparent, timeout_s, acknowledge_s, acknowledged, answer))
        group.left += 1
        if len(group.items) >= min(ITEMS_MAX, max(2, company, self._under_way[kind] // 2)):
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
        if len(group.items) == 1:
            _fail(group.items[0], _Alone())
        elif group.items:
            group.call = asyncio.create_task(self._call(group))

    async def _call(self, group: _Group) -> None:
        try:
            reply = await self._ask(group)
            results = reply.response.results
            for number, item in enumerate(group.items):
                result = results[number] if len(results) == len(group.items) else None
                self._hand_out(item, result, reply.queue_s)
        except Failure as failure:
            if failure.code in _NOT_FOR_US:
                self._allowed = False
            for item in group.items:
                # What is for good may be one item's doing; then the others need not suffer for it.
                _fail(item, failure.again() if failure.code in AGAIN else _Alone())
        except asyncio.CancelledError:
            for item in group.items:
                item.answer.cancel()
            raise
        except Exception as error:  # noqa: BLE001  Each caller is handed it: they would wait for nothing else.
            for item in group.items:
                _fail(item, error)

    def _hand_out(
        self, item: _Item, result: pb.BatchSubmitApplicationsResponse.Result | None, queue_s: float | None
    ) -> None:
        """Its own result to an item; one that is nobody's, or somebody else's, to none."""
        said = result.WhichOneof("outcome") if result and result.request_id == item.request.request_id else None
        if result is None or said is None:
            _fail(item, _Alone())
        elif said == "error":
            _fail(item, Failure.of(result.error))
        elif not item.answer.done():
            response = pb.SubmitApplicationResponse()
            response.application.CopyFrom(result.application)
            item.answer.set_result(Reply(response, queue_s))

    async def _ask(self, group: _Group) -> Reply[pb.BatchSubmitApplicationsResponse]:
        items, metadata = group.items, group.metadata
        request = pb.BatchSubmitApplicationsRequest(parent=items[0].request.parent)
        for item in items:
            one = request.requests.add()
            one.CopyFrom(item.request)
            one.ClearField("wait")
            one.traceparent = item.traceparent
        timeout_s = max(item.timeout_s for item in items)
        wait = min((item.request.wait for item in items), key=lambda one: one.ToNanoseconds())
        if not wait.ToNanoseconds():
            return await self._transport.unary(SUBMIT_MANY, request, timeout_s, metadata)
        request.wait.CopyFrom(wait)

        def acknowledged(queue_s: float | None) -> None:
            for item in items:
                if not item.answer.done():
                    item.acknowledged(queue_s)

        acknowledge_s = max(item.acknowledge_s for item in items)
        return await self._transport.waiting(SUBMIT_MANY, request, timeout_s, metadata, acknowledge_s, acknowledged)

    async def _watched(
        self, shared: Reply[pb.SubmitApplicationResponse], wait_s: float, metadata: Metadata
    ) -> Reply[pb.SubmitApplicationResponse]:
        """What becomes within `wait_s` of one that is stored; as it was, where nobody says."""
        newest = shared.response.application
        watch = pb.WatchApplicationRequest(name=newest.name)
        with contextlib.suppress(Failure, TimeoutError):
            async with asyncio.timeout(wait_s), self._transport.stream(WATCH, watch, metadata) as changes:
                async for change in changes:
                    newest = change.application
                    if newest.state != pb.Application.STATE_PENDING:
                        break
        return Reply(pb.SubmitApplicationResponse(application=newest), shared.queue_s)


class _Alone(Failure):
    """To be sent alone after all."""

    def __init__(self) -> None:
        super().__init__("UNKNOWN", "to be sent alone")


def _class_of(submit: pb.SubmitApplicationRequest) -> _Class:
    return submit.parent, submit.application.priority or pb.PRIORITY_INTERACTIVE


def _said(metadata: Metadata, name: str) -> str:
    return next((value for key, value in metadata if key == name), "")


def _fail(item: _Item, error: Exception) -> None:
    if not item.answer.done():
        item.answer.set_exception(error)


def _give_up(answer: asyncio.Future[Any], timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(Failure("DEADLINE_EXCEEDED", f"no answer within {timeout_s:.2g} s"))
