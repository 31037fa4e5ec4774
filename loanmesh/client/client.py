"""Calls to intake: the asynchronous client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from google.rpc import status_pb2
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client import many, transport
from loanmesh.client.calls import BULK, INTERACTIVE, PARTNER, Attempts, Calls, Lane, Urgency, Wait
from loanmesh.client.errors import Unreachable
from loanmesh.client.journal import Journal
from loanmesh.client.results import DECIDED, WAITS_FOR_PEOPLE, Decided, Pending
from loanmesh.client.security import Security
from loanmesh.client.together import CROWD, Together
from loanmesh.client.transport import GrpcTransport, Transport
from loanmesh.runtime.budget import BudgetSettings
from loanmesh.runtime.clock import Clock, SystemClock, new_uuid7
from loanmesh.runtime.throttle import ThrottleSettings

WAIT_S_MAX = 60.0
"""Longest wait that intake grants in one call."""
ONE_CALL = Attempts(first_s=1.0, most_s=5.0)
MANY_ATTEMPTS = Attempts(first_s=5.0, most_s=20.0)
"""A batch of 500 is half a second's work for a busy intake."""
MANY_THROTTLE = ThrottleSettings(initial=2, floor=1, ceiling=16, target_s=0.5)
"""Batches in flight. A batch queues behind itself, so its queue delay may be longer."""
_STEADY = (transport.GET, transport.ACCEPT, transport.WITHDRAW, transport.SUPPLY)
"""Calls that take about as long as a submit does. Pages, histories and explanations take as long as they are long."""
_URGENCY: dict[pb.Priority.ValueType, Urgency] = {
    pb.PRIORITY_PARTNER: PARTNER,
    pb.PRIORITY_BULK: BULK,
    pb.PRIORITY_REASSESSMENT: BULK,
}


class Client:
    """Speaks to intake on behalf of one lender. For one event loop; `SyncClient` is for everybody else.

    address      `host:port`, several `ip:port` with commas, or a gRPC name such as `dns:///intake:7401`.
    client_id    who calls; request ids are unique per client. Over TLS, certificate or token say it instead.
    patience_s   how long to repeat a call that finds the mesh busy or away, where the call names no deadline.
    security     certificates, CA and token; None: no TLS, which a mesh answers on its own machine only.
    throttle     bounds of the limits on submits and on other calls in flight.  budget  how much may be repeated.
    share_from   how many submits are under way before new ones share calls; see docs/client.md.
    clock, dice, new_id, transport   where time, chance, request ids and answers come from; for tests and simulators.

    Every method raises CallFailed (change the request), Unreachable (send it again later, same request_id) or
    Overloaded (the same; it says when). Methods that change something take a `request_id` and make one where it is
    absent; the same id with the same content is answered the same, and nothing happens twice.
    """

    def __init__(
        self,
        address: str,
        *,
        lender: str = "lenders/demo",
        client_id: str = "local",
        patience_s: float = 30.0,
        security: Security | None = None,
        throttle: ThrottleSettings | None = None,
        budget: BudgetSettings | None = None,
        share_from: int = CROWD,
        clock: Clock | None = None,
        dice: random.Random | None = None,
        new_id: Callable[[], str] | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._lender = lender
        self._client_id = client_id
        self._patience_s = patience_s
        self._clock = clock or SystemClock()
        self._new_id = new_id or functools.partial(new_uuid7, self._clock)
        alone = transport or GrpcTransport(address, security, self._clock)
        self._transport = together = Together(alone, self._clock, share_from)
        self._one = Lane(throttle or ThrottleSettings(), ONE_CALL, self._clock, company=lambda: together.shares)
        self._many = Lane(MANY_THROTTLE, MANY_ATTEMPTS, self._clock)
        # What is not let in as new may be read and changed all the same.
        self._rest = Lane(throttle or ThrottleSettings(), ONE_CALL, self._clock, gated=False)
        self._calls = Calls(
            self._transport,
            (("loanmesh-client", client_id),),
            budget or BudgetSettings(),
            self._clock,
            dice or random.Random(),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    # --- Submit ---

    async def submit(
        self,
        application: pb.Application,
        *,
        request_id: str | None = None,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> pb.Application:
        """Store an application; wait up to `wait_s` seconds for its decision. A pending answer is a normal one.

        deadline_s  seconds after which the caller has no use for an answer. Absent: the client's patience and the wait.
        """
        if deadline_s is None:
            deadline_s = self._patience_s + wait_s
        key = request_id or self._new_id()
        return await self._submit(application, key, min(wait_s, WAIT_S_MAX), deadline_s)

    async def submit_and_wait(
        self, application: pb.Application, *, deadline_s: float = 10.0, request_id: str | None = None
    ) -> Decided | Pending:
        """Store an application and wait for its decision as long as the caller does.

        Pending when the deadline comes first, or when somebody has to supply or review something; it is stored then,
        and has an estimate. Raises Unreachable or Overloaded when not even storing was confirmed in time.
        """
        ends_at = self._clock.monotonic() + deadline_s
        key = request_id or self._new_id()
        application = await self._submit(application, key, min(WAIT_S_MAX, deadline_s), deadline_s)
        left_s = ends_at - self._clock.monotonic()
        if application.state not in DECIDED | WAITS_FOR_PEOPLE and left_s > 0:
            with contextlib.suppress(TimeoutError, Unreachable):  # It is stored: what was seen last is an answer.
                async with asyncio.timeout(left_s), contextlib.aclosing(self.watch(application.name)) as changes:
                    async for application in changes:
                        if application.state in WAITS_FOR_PEOPLE:
                            break
        if application.state in DECIDED:
            return Decided(key, application)
        return Pending(key, application)

    async def submit_many(
        self,
        applications: many.Source,
        *,
        resume: Path | str | None = None,
        priority: pb.Priority.ValueType = pb.PRIORITY_BULK,
    ) -> AsyncGenerator[many.Result, None]:
        """Store many at full speed; one result an item, as they come, in no order.

        applications  any iterable, asynchronous ones too, of applications or (request_id, application) pairs. Read
                      only a few batches ahead of the results taken.
        resume        a file that remembers what is acknowledged: after a crash the same call goes on where it was, and
                      answers what it had done with `application=None`. Applications without a request_id get one from
                      their content then, so that the order may change and one that stands there twice is stored once.
        priority      for applications that state none.

        An application that is refused is a `Refused` among the results. Raises Unreachable or Overloaded when a batch
        made no progress for the client's patience; with `resume`, call it again later. ValueError for a `resume` file
        that belongs to another lender or client.
        """
        async with contextlib.aclosing(many.run(self._submission(resume, priority), applications)) as results:
            async for result in results:
                yield result

    async def submit_batch(
        self, applications: Sequence[tuple[str, pb.Application]]
    ) -> list[pb.Application | status_pb2.Status]:
        """Store up to 500 applications, each with its request_id; one answer each, in order, busy ones not repeated."""
        request = pb.BatchSubmitApplicationsRequest(
            parent=self._lender,
            requests=[pb.SubmitApplicationRequest(request_id=key, application=a) for key, a in applications],
        )
        answer = await self._calls.unary(
            transport.SUBMIT_MANY, request, self._many, deadline_s=self._patience_s, urgency=BULK, steady=False
        )
        return [r.application if r.WhichOneof("outcome") == "application" else r.error for r in answer.results]

    # --- Read ---

    async def get(self, name: str, *, deadline_s: float | None = None) -> pb.Application:
        """One application."""
        return (await self._ask(transport.GET, pb.GetApplicationRequest(name=name), deadline_s)).application

    async def list(
        self,
        *,
        filter: str = "",
        order_by: str = "",
        page_size: int = 0,
        page_token: str = "",
        deadline_s: float | None = None,
    ) -> pb.ListApplicationsResponse:
        """A page of the lender's applications."""
        request = pb.ListApplicationsRequest(
            parent=self._lender, filter=filter, order_by=order_by, page_size=page_size, page_token=page_token
        )
        return await self._ask(transport.LIST, request, deadline_s)

    async def watch(self, name: str) -> AsyncGenerator[pb.Application, None]:
        """The application as it is, then after each change until it is decided; takes up again when the connection
        breaks. Unreachable after the client's patience without a mesh."""
        seen = 0
        request = pb.WatchApplicationRequest(name=name)
        answers = self._calls.stream(transport.WATCH, request, patience_s=self._patience_s)
        async with contextlib.aclosing(answers):
            async for answer in answers:
                # After a reconnection the same comes again, or, from a replica that lags, an older one.
                if answer.application.revision > seen:
                    seen = answer.application.revision
                    yield answer.application

    async def explain(
        self, name: str, *, schedules: bool = False, deadline_s: float | None = None
    ) -> pb.ExplainDecisionResponse:
        """Why it was decided so."""
        request = pb.ExplainDecisionRequest(name=name, include_schedules=schedules)
        return await self._ask(transport.EXPLAIN, request, deadline_s)

    async def replay(self, name: str, *, deadline_s: float | None = None) -> pb.ReplayDecisionResponse:
        """Whether deciding once more from the stored evidence gives the same."""
        return await self._ask(transport.REPLAY, pb.ReplayDecisionRequest(name=name), deadline_s)

    async def history(self, name: str, *, deadline_s: float | None = None) -> pb.ListEventsResponse:
        """What happened to it."""
        return await self._ask(transport.HISTORY, pb.ListEventsRequest(parent=name, page_size=1000), deadline_s)

    # --- Change ---

    async def accept(
        self, name: str, offer_id: str, *, request_id: str | None = None, deadline_s: float | None = None
    ) -> pb.Application:
        """Accept an offer."""
        request = pb.AcceptOfferRequest(name=name, request_id=request_id or self._new_id(), offer_id=offer_id)
        return (await self._ask(transport.ACCEPT, request, deadline_s)).application

    async def withdraw(
        self, name: str, *, request_id: str | None = None, deadline_s: float | None = None
    ) -> pb.Application:
        """Withdraw an application."""
        request = pb.WithdrawApplicationRequest(name=name, request_id=request_id or self._new_id())
        return (await self._ask(transport.WITHDRAW, request, deadline_s)).application

    async def supply(self, request: pb.SupplyInformationRequest, *, deadline_s: float | None = None) -> pb.Application:
        """Supply missing information; `request_id` is filled in where empty."""
        request.request_id = request.request_id or self._new_id()
        return (await self._ask(transport.SUPPLY, request, deadline_s)).application

    # --- What is under way ---

    @property
    def in_flight_limit(self) -> int:
        """Submits that may be in flight now, as learned from the mesh's answers; batches and what is not a submit have
        limits of their own."""
        return self._one.throttle.limit.calls

    @property
    def waiting(self) -> int:
        """Calls that wait here for their turn."""
        return sum(lane.throttle.waiting for lane in (self._one, self._many, self._rest))

    # --- Within ---

    async def _submit(self, application: pb.Application, key: str, wait_s: float, deadline_s: float) -> pb.Application:
        request = pb.SubmitApplicationRequest(parent=self._lender, request_id=key)
        request.application.CopyFrom(application)  # A third of what it costs as an argument.
        answer = await self._calls.unary(
            transport.SUBMIT,
            request,
            self._one,
            deadline_s=deadline_s,
            urgency=_URGENCY.get(application.priority, INTERACTIVE),
            wait=Wait(wait_s, lambda s: request.wait.FromNanoseconds(round(s * 1e9))) if wait_s > 0 else None,
            request_id=key,
        )
        return answer.application

    def _submission(self, resume: Path | str | None, priority: pb.Priority.ValueType) -> many.Submission:
        async def send(batch: many.Batch) -> None:
            await self._calls.unary(
                transport.SUBMIT_MANY,
                batch.request,
                self._many,
                deadline_s=self._patience_s,
                urgency=BULK,
                steady=len(batch.request.requests) == many.BATCH_MAX,
                check=batch.check,
            )

        journal = Journal(Path(resume), self._lender, self._client_id, self._new_id) if resume else None
        # One more than may be in flight, so that the next one is ready when a permit comes back.
        return many.Submission(
            self._lender, send, self._new_id, priority, lambda: self._many.throttle.limit.calls + 1, journal
        )

    async def _ask(
        self, method: transport.Method[transport.Req, transport.Res], request: Any, deadline_s: float | None
    ) -> transport.Res:
        return await self._calls.unary(
            method,
            request,
            self._rest,
            deadline_s=self._patience_s if deadline_s is None else deadline_s,
            steady=method in _STEADY,
            request_id=getattr(request, "request_id", None),
        )
