"""An intake in memory behind the client's Transport: stores, answers, and fails as told. Runs on virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from google.rpc import code_pb2, status_pb2
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.transport import Failure, Metadata, Method, Reply
from loanmesh.runtime.errors import InvalidRequest, Overloaded
from loanmesh.runtime.status import item_status


@dataclass
class Attempt:
    """One call as it arrived."""

    at: float
    method: str
    request: Any
    timeout_s: float
    metadata: dict[str, str]


@dataclass
class MemoryMesh:
    """What it stores counts by request_id, so that something stored twice shows.

    faults        what happens to the next calls instead: a Failure to raise, or "hang", or "lose" (stored, but the
                  answer is lost); used up one by one. `always` is what happens when there is none left.
    decide_s      how long a decision takes from storing on.
    queue_s       what it tells of its queue.
    early         whether it acknowledges before the decision.
    """

    faults: deque[Failure | str] = field(default_factory=deque)
    always: Failure | str | None = None
    latency_s: float = 0.01
    decide_s: float = 0.05
    queue_s: float | None = 0.0
    early: bool = True
    attempts: list[Attempt] = field(default_factory=list)
    cancelled: int = 0
    under_way: int = 0
    applications: dict[str, pb.Application] = field(default_factory=dict)
    stored: Counter[str] = field(default_factory=Counter)
    busy_items: Counter[str] = field(default_factory=Counter)
    """How often the item of a batch with this request_id is still turned away."""

    async def unary(
        self, method: Method[Any, Any], request: Any, timeout_s: float, metadata: Metadata, company: int = 1
    ) -> Reply[Any]:
        return await self._serve(method, request, timeout_s, metadata, None, None)

    async def waiting(
        self,
        method: Method[Any, Any],
        request: Any,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float,
        acknowledged: Callable[[float | None], None],
        company: int = 1,
    ) -> Reply[Any]:
        return await self._serve(method, request, timeout_s, metadata, acknowledge_s, acknowledged)

    @contextlib.asynccontextmanager
    async def stream(
        self, method: Method[Any, Any], request: Any, metadata: Metadata
    ) -> AsyncIterator[AsyncIterator[Any]]:
        self._note(method, request, float("inf"), metadata)
        self.under_way += 1
        try:
            yield self._changes(request.name)
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        """Nothing is held."""

    def decide(self, application: pb.Application, state: pb.Application.State.ValueType) -> None:
        application.state = state
        application.revision += 1

    async def _serve(
        self,
        method: Method[Any, Any],
        request: Any,
        timeout_s: float,
        metadata: Metadata,
        acknowledge_s: float | None,
        acknowledged: Callable[[float | None], None] | None,
    ) -> Reply[Any]:
        self._note(method, request, timeout_s, metadata)
        self.under_way += 1
        try:
            async with asyncio.timeout(timeout_s):
                fault = self.faults.popleft() if self.faults else self.always
                await asyncio.sleep(self.latency_s)  # noqa: TID251  Virtual time.
                if isinstance(fault, Failure):
                    raise fault.again()
                if fault == "hang":
                    if acknowledge_s is not None and self.early:
                        await asyncio.sleep(acknowledge_s)  # noqa: TID251  Virtual time.
                        raise Failure("DEADLINE_EXCEEDED", "not stored")
                    await asyncio.Event().wait()
                answer = await getattr(self, f"_{method.name}")(request, acknowledged)
                if fault == "lose":
                    raise Failure("UNAVAILABLE", "connection lost")
                return Reply(answer, self.queue_s)
        except TimeoutError:
            raise Failure("DEADLINE_EXCEEDED", "out of time") from None
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1

    def _note(self, method: Method[Any, Any], request: Any, timeout_s: float, metadata: Metadata) -> None:
        copy = type(request)()
        copy.CopyFrom(request)
        at = asyncio.get_running_loop().time()
        self.attempts.append(Attempt(at, method.name, copy, timeout_s, dict(metadata)))

    async def _SubmitApplication(
        self, request: pb.SubmitApplicationRequest, acknowledged: Callable[[float | None], None] | None
    ) -> pb.SubmitApplicationResponse:
        application = self._store(request.request_id, request.application)
        wait_s = request.wait.ToNanoseconds() / 1e9
        if wait_s and application.state == pb.Application.STATE_PENDING:
            if acknowledged and self.early:
                acknowledged(self.queue_s)
            await asyncio.sleep(min(wait_s, self.decide_s))  # noqa: TID251  Virtual time.
            if self.decide_s <= wait_s:
                self.decide(application, pb.Application.STATE_DECIDED)
        return pb.SubmitApplicationResponse(application=application)

    async def _BatchSubmitApplications(
        self, request: pb.BatchSubmitApplicationsRequest, acknowledged: Callable[[float | None], None] | None
    ) -> pb.BatchSubmitApplicationsResponse:
        answer = pb.BatchSubmitApplicationsResponse()
        wait_s = request.wait.ToNanoseconds() / 1e9
        if wait_s:
            if acknowledged and self.early:
                acknowledged(self.queue_s)
            await asyncio.sleep(min(wait_s, self.decide_s))  # noqa: TID251  Virtual time.
        for item in request.requests:
            result = answer.results.add(request_id=item.request_id)
            if item.application.channel == "bad":
                result.error.CopyFrom(item_status(InvalidRequest(("application.channel", "is bad"))))
            elif self.busy_items[item.request_id]:
                self.busy_items[item.request_id] -= 1
                result.error.CopyFrom(item_status(Overloaded("busy", 0.5)))
            else:
                stored = self._store(item.request_id, item.application)
                if wait_s >= self.decide_s > 0 and item.application.channel != "slow":
                    self.decide(stored, pb.Application.STATE_DECIDED)
                result.application.CopyFrom(stored)
        return answer

    async def _GetApplication(self, request: pb.GetApplicationRequest, _: Any) -> pb.GetApplicationResponse:
        found = [a for a in self.applications.values() if a.name == request.name]
        if not found:
            raise Failure("NOT_FOUND", f"{request.name} is not known")
        return pb.GetApplicationResponse(application=found[0])

    async def _ListApplications(self, request: pb.ListApplicationsRequest, _: Any) -> pb.ListApplicationsResponse:
        return pb.ListApplicationsResponse(applications=self.applications.values())

    def _store(self, request_id: str, application: pb.Application) -> pb.Application:
        if request_id not in self.applications:
            self.stored[request_id] += 1
            kept = self.applications[request_id] = pb.Application()
            kept.CopyFrom(application)
            kept.name = f"lenders/demo/applications/{request_id}"
            kept.state = pb.Application.STATE_PENDING
            kept.estimate_time.FromSeconds(1_800_000_000)
            kept.revision = 1
        return self.applications[request_id]

    async def _changes(self, name: str) -> AsyncIterator[pb.WatchApplicationResponse]:
        fault = self.faults.popleft() if self.faults else self.always
        if isinstance(fault, Failure):
            raise fault.again()
        application = next(a for a in self.applications.values() if a.name == name)
        yield pb.WatchApplicationResponse(application=application)
        await asyncio.sleep(self.decide_s)  # noqa: TID251  Virtual time.
        if fault == "lose":
            raise Failure("UNAVAILABLE", "connection lost")
        if application.state == pb.Application.STATE_PENDING:
            self.decide(application, pb.Application.STATE_DECIDED)
            yield pb.WatchApplicationResponse(application=application)


def away() -> Failure:
    return Failure("UNAVAILABLE", "nobody there")


def busy(pushback_s: float | None = None) -> Failure:
    return Failure("RESOURCE_EXHAUSTED", "too much", pushback_s, status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED))
