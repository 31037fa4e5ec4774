"""OpsService: a process's vitals over gRPC. The same servicer in every service."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import OrderedDict
from typing import Any

import grpc
import structlog
from lending.ops.v1 import ops_service_pb2 as pb
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceServicer

from loanmesh.runtime import semconv
from loanmesh.runtime.breaker import State
from loanmesh.runtime.caller import proven_path
from loanmesh.runtime.errors import NotFound, RequestIdConflict
from loanmesh.runtime.guard import Guard
from loanmesh.runtime.histogram import Histogram
from loanmesh.runtime.loop_lag import Heartbeat
from loanmesh.runtime.vitals import Vitals

SERVICE_NAME = "lending.ops.v1.OpsService"
REQUESTS_KEPT = 1000
"""Orders remembered, so that a late repeat changes nothing; people give few."""
_STATES = {
    State.CLOSED: pb.BREAKER_STATE_CLOSED,
    State.OPEN: pb.BREAKER_STATE_OPEN,
    State.HALF_OPEN: pb.BREAKER_STATE_HALF_OPEN,
    State.FORCED_OPEN: pb.BREAKER_STATE_FORCED_OPEN,
    State.FORCED_CLOSED: pb.BREAKER_STATE_FORCED_CLOSED,
}
_KINDS = {"source": pb.Dependency.KIND_SOURCE, "service": pb.Dependency.KIND_SERVICE}
_OVERRIDES = {
    pb.OVERRIDE_AUTOMATIC: (State.CLOSED, "follows its rules again"),
    pb.OVERRIDE_FORCED_OPEN: (State.FORCED_OPEN, "forced open"),
    pb.OVERRIDE_FORCED_CLOSED: (State.FORCED_CLOSED, "forced closed"),
}
_Context = grpc.aio.ServicerContext[Any, Any]
log = structlog.get_logger()


class OpsServicer(OpsServiceServicer):
    """Speaks for the process it runs in."""

    def __init__(
        self,
        service: str,
        instance: str,
        started_at: dt.datetime,
        vitals: Vitals,
        heartbeat: Heartbeat,
        calls: Histogram | None = None,
    ) -> None:
        self._service = service
        self._instance = instance
        self._started_at = started_at
        self._vitals = vitals
        self._heartbeat = heartbeat
        self._calls = calls
        self._guards = {guard.name: guard for guard in vitals.guards}
        self._orders: OrderedDict[str, bytes] = OrderedDict()

    async def GetStatus(self, request: pb.GetStatusRequest, context: _Context) -> pb.GetStatusResponse:
        """How the process is now."""
        vitals = self._vitals
        status = pb.GetStatusResponse(
            service=self._service,
            instance=self._instance,
            draining=vitals.draining,
            loop_lag_ms=self._heartbeat.lag_s * 1e3,
            loop_lag_max_ms=self._heartbeat.lag_s_max * 1e3,
            queues=[pb.Queue(name=q.name, length=q.length(), limit=q.limit) for q in vitals.queues],
            backlog=vitals.backlog,
            tasks=len(asyncio.all_tasks()),
            decisions=vitals.decisions.total(),
            accepted=vitals.accepted.total(),
            bounds_s=semconv.DURATION_BOUNDS_S,
        )
        for said, counts in self._calls.counted() if self._calls else ():
            status.calls.add(
                method=said.get(semconv.RPC_METHOD, ""), status=said.get(semconv.RPC_STATUS_CODE, ""), counts=counts
            )
        status.start_time.FromDatetime(self._started_at)
        for rest in vitals.standing.resting if vitals.standing else ():
            told = status.resting.add(waiting_for=rest.waiting_for, applications=rest.applications)
            told.retry_time.FromNanoseconds(int(rest.retry_at * 1e9))
        for step in vitals.steps:
            if step.check():
                shown = status.degradations.add(step=step.name, subject=step.subject, cause=step.cause)
                if step.since:
                    shown.start_time.FromDatetime(step.since)
        return status

    async def ListDependencies(
        self, request: pb.ListDependenciesRequest, context: _Context
    ) -> pb.ListDependenciesResponse:
        """Whom the process calls, and how that goes."""
        return pb.ListDependenciesResponse(dependencies=[_dependency(guard) for guard in self._guards.values()])

    async def OverrideDependency(
        self, request: pb.OverrideDependencyRequest, context: _Context
    ) -> pb.OverrideDependencyResponse:
        """Do what a person orders, once."""
        guard = self._guards.get(request.name.removeprefix("dependencies/"))
        if guard is None:
            known = ", ".join(f"dependencies/{name}" for name in self._guards) or "none"
            raise NotFound(f"{self._service} has no {request.name}; it has: {known}")
        order = request.SerializeToString(deterministic=True)
        before = self._orders.setdefault(request.request_id, order)
        if before != order:
            raise RequestIdConflict(f"request_id {request.request_id} was used for another order; choose a new one")
        if before is order:
            self._obey(guard, request)
        while len(self._orders) > REQUESTS_KEPT:
            self._orders.popitem(last=False)
        return pb.OverrideDependencyResponse(dependency=_dependency(guard))

    def _obey(self, guard: Guard, request: pb.OverrideDependencyRequest) -> None:
        state, what = _OVERRIDES[request.override]
        reason = f": {request.reason}" if request.reason else ""
        path = proven_path()
        guard.force(state, f"{what} by {request.actor}{f' ({path})' if path else ''}{reason}")
        log.warning(
            "dependency_overridden",
            dependency=guard.name,
            override=pb.Override.Name(request.override).removeprefix("OVERRIDE_").lower(),
            actor=request.actor,
            proven=path,
            reason=request.reason,
            request_id=request.request_id,
        )


def _dependency(guard: Guard) -> pb.Dependency:
    breaker = guard.breaker
    shown = pb.Dependency(
        name=f"dependencies/{guard.name}",
        kind=_KINDS[guard.kind],
        breaker_state=_STATES[breaker.state],
        breaker_cause=breaker.cause,
        in_use=guard.in_use,
        in_use_limit=guard.bulkhead.at_once_max,
        waiting=guard.waiting,
        waiting_limit=guard.bulkhead.waiting_max,
        wait_max_ms=guard.wait_s_max * 1e3,
        calls=guard.calls,
        failures=guard.failures,
        overloads=guard.overloads,
        refusals=guard.refusals,
    )
    shown.breaker_change_time.FromDatetime(breaker.since)
    if breaker.state is State.OPEN:
        shown.retry_time.FromDatetime(breaker.retry_at)
    for change in breaker.history:
        shown.breaker_history.add(state=_STATES[change.state], cause=change.cause).change_time.FromDatetime(change.at)
    return shown
