"""One call, from the caller's wish to its end: admitted, sent, repeated, traced, within one deadline.

This is the only layer that repeats a caller's calls. An attempt that finds the mesh busy or away is repeated after a
jittered backoff, or after what the server asked for, as long as the retry budget and the deadline allow; an empty
budget is like a retry that failed without having been sent. All changes carry a request_id, so repeating is safe.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message
from opentelemetry import metrics, propagate, trace

from loanmesh.client.errors import CallFailed, Overloaded, TlsFailed, Unreachable
from loanmesh.client.transport import SENT_MS, Failure, Metadata, Method, Reply, Transport
from loanmesh.runtime import deadline, errors, semconv, tracing
from loanmesh.runtime.budget import BudgetSettings, RetryBudget, Token
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.throttle import Permit, Throttle, ThrottleSettings

AGAIN = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"})
"""Ends of an attempt after which another makes sense. CANCELLED: a server that stops; our own never get here."""
OPEN_MAX = 20_000
"""Calls a client has under way, waiting and backing off ones included; beyond, new ones are turned away at once."""
BACKOFF_S, BACKOFF_S_MAX = 0.1, 2.0
"""First and longest wait between attempts, each drawn from the upper half. stamina waits 0.1 to 5 s, google's api-core
1 to 60 s; ours end at 2 s, since a person waits, and the retry budget, not the wait, is what protects the mesh."""
PUSHBACK_JITTER = 1.3
"""A server's wish is exceeded by up to this, never undercut: all whom it sent away must not come back at once."""
NOTES_MAX = 50
"""Most notes of one call; the first ones tell how it began."""
LOCAL_WAIT_TOLD_S = 0.05
"""A wait for the throttle's leave from which on the span tells of it."""
Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)
Check = Callable[[Any], Failure | None]


class Urgency(NamedTuple):
    """A class of urgency: its rank, 0 is the most urgent, and its name in metadata."""

    rank: int
    name: str


INTERACTIVE, PARTNER, BULK = Urgency(0, "interactive"), Urgency(1, "partner"), Urgency(2, "bulk")


@dataclass(frozen=True, slots=True)
class Attempts:
    """How long one attempt may take: the first, then twice as long each time, and half of the time left at most.

    Short at first, so that a replica that hangs costs a second and not the caller's whole patience; longer then, so
    that a mesh that is merely slow is not asked the same again and again. Half, so that there is another try: when one
    of three replicas was paused, 9 of 700 calls with 2 s of patience met it twice and failed; with this, 0 of 2,100.
    """

    first_s: float
    most_s: float
    least_s: float = 0.25

    def limit_s(self, number: int, left_s: float, usual_s: float = 0.0) -> float:
        """Seconds for attempt `number`, from 0, when so much time is left.

        usual_s  what answers take now: an attempt that is given less cannot succeed.
        """
        least_s = max(self.least_s, left_s / 2, usual_s)
        return min(left_s, least_s, self.most_s, self.first_s * 2.0 ** min(number, 30))


@dataclass(frozen=True, slots=True)
class Wait:
    """A wish to wait: for so long at most, and how to say so in the request."""

    longest_s: float
    say: Callable[[float], None]

    def ask(self, left_s: float) -> float:
        """Say how long to wait when so much time is left: less a share for the way back, so that the last word is
        "pending, decided at about ..." and not silence. Answers what was said, seconds."""
        wait_s = min(self.longest_s, left_s - min(0.2, 0.1 * left_s))
        self.say(wait_s)
        return wait_s


class Lane:
    """Calls of about the same size, under one adaptive limit. `gated`, `company`: see Throttle."""

    def __init__(
        self,
        settings: ThrottleSettings,
        attempts: Attempts,
        clock: Clock,
        *,
        gated: bool = True,
        company: Callable[[], bool] = lambda: False,
    ) -> None:
        self.throttle = Throttle(settings, clock, gated=gated, company=company)
        self.attempts = attempts


class Calls:
    """Makes calls for one client. Lives on one event loop.

    metadata  sent with each call.
    """

    def __init__(
        self, transport: Transport, metadata: Metadata, budget: BudgetSettings, clock: Clock, dice: random.Random
    ) -> None:
        self._transport = transport
        self._metadata = tuple(metadata)
        self._clock = clock
        self._dice = dice
        self._tracer = trace.get_tracer("loanmesh")
        self._recorder = tracing.recorder() or tracing.beside(trace.get_tracer_provider(), clock, dice)
        self._duration = metrics.get_meter("loanmesh").create_histogram(semconv.CLIENT_DURATION, unit="s")
        self.budget = RetryBudget(budget, clock)
        # Names our clock, so that the queue before intake's door can be told from the difference of clocks.
        self._sender = f"{dice.getrandbits(48):012x}"
        self.open = 0

    async def unary(
        self,
        method: Method[Req, Res],
        request: Req,
        lane: Lane,
        *,
        deadline_s: float,
        urgency: Urgency = INTERACTIVE,
        steady: bool = True,
        wait: Wait | None = None,
        request_id: str | None = None,
        check: Check = lambda _: None,
    ) -> Res:
        """The answer, within `deadline_s` and within what a surrounding call has left.

        steady  whether such calls take about the same time, so that what they take longer tells of a queue.
        wait    how long the server is asked to wait for a decision before it answers; None: not at all.
        check   looks at an answer; a Failure it returns is treated as if the mesh had sent it. It may take what is
                done out of the request, which is then sent without it.
        Raises CallFailed, Unreachable or Overloaded.
        """
        with _Call(self, method.full_name, urgency, deadline_s, request_id) as call:
            while True:
                try:
                    reply = await self._attempt(call, method, request, lane, steady, wait, check)
                    call.undecided = bool(wait) and _is_pending(reply.response)
                    return reply.response
                except Failure as failure:
                    await self._pause(call, failure)

    async def stream(self, method: Method[Req, Res], request: Req, *, patience_s: float) -> AsyncGenerator[Res, None]:
        """Answers until the server ends the stream; opened again when it breaks, so that some may come twice.

        Holds no permit: a stream waits most of its life. Raises CallFailed, or Unreachable after `patience_s` without
        an answer from its breaking on.
        """
        with _Call(self, method.full_name, INTERACTIVE, patience_s, None) as call:
            while True:
                try:
                    call.attempts += 1
                    async with self._transport.stream(method, request, call.metadata) as answers:
                        async for answer in answers:
                            call.answered()
                            yield answer
                    return
                except Failure as failure:
                    if not call.failures:
                        call.start_patience()  # It worked until now.
                    await self._pause(call, failure)

    async def _attempt(
        self,
        call: _Call,
        method: Method[Req, Res],
        request: Req,
        lane: Lane,
        steady: bool,
        wait: Wait | None,
        check: Check,
    ) -> Reply[Res]:
        came = self._clock.monotonic()
        permit = await self._admitted(call, lane)
        attempt_s = lane.attempts.limit_s(call.attempts, call.left_s, lane.throttle.usual_s)
        call.attempts += 1
        timely = steady and not wait  # One that waits takes as long as the decision does.
        try:
            sent = self._clock.monotonic()
            metadata = (*call.metadata, (SENT_MS, f"{self._sender}:{int(sent * 1000)}:{int((sent - came) * 1000)}"))
            if wait:
                wait_s = wait.ask(call.left_s)
                reply = await self._transport.waiting(
                    method,
                    request,
                    min(call.left_s, attempt_s + wait_s),
                    metadata,
                    attempt_s,
                    permit.answered,
                    permit.company,
                )
            else:
                reply = await self._transport.unary(method, request, attempt_s, metadata, permit.company)
            if failure := check(reply.response):
                raise failure
        except Failure as failure:
            if failure.progress:
                call.answered()
                call.start_patience()
            if failure.code == "RESOURCE_EXHAUSTED":
                permit.refused(self._wished_s(failure), yields=failure.yields)
            elif failure.code == "DEADLINE_EXCEEDED":
                permit.timed_out()
            elif failure.code not in AGAIN:
                permit.answered(timely=timely)
                call.answered()
            raise
        else:
            permit.answered(reply.queue_s, timely=timely)
            call.answered()
            return reply
        finally:
            permit.release()

    async def _admitted(self, call: _Call, lane: Lane) -> Permit:
        asked = self._clock.monotonic()
        try:
            permit = await lane.throttle.acquire(call.urgency.rank, call.left_s)
            if (waited_s := self._clock.monotonic() - asked) >= LOCAL_WAIT_TOLD_S:
                call.note("waited_for_a_turn", {semconv.WAITED_MS: round(waited_s * 1000)})
            return permit
        except errors.Overloaded as error:
            call.unsent()
            raise Overloaded(str(error), error.retry_s, call.request_id) from None
        except asyncio.CancelledError:
            call.unsent()
            raise

    async def _pause(self, call: _Call, failure: Failure) -> None:
        """Return when the call may be repeated; raise what the caller gets where it may not."""
        call.failed(failure)
        if failure.code not in AGAIN:
            raise failure.refusal() from failure
        wait_s = self._backoff_s(call)
        if (wished_s := self._wished_s(failure)) is not None:
            wait_s = wished_s
        while True:
            # A negative pushback means: not again.
            if wait_s < 0 or wait_s >= call.left_s:
                raise self._too_late(call, failure, wait_s) from failure
            await self._clock.sleep(wait_s)
            call.token = self.budget.try_take()
            if call.token:
                return
            call.note("retry_budget_empty", {})
            call.failures += 1
            wait_s = self._backoff_s(call)

    def _wished_s(self, failure: Failure) -> float | None:
        """For how long the server wants to hear no more, exceeded by a little; None where it did not say."""
        if failure.pushback_s is None:
            return None
        return failure.pushback_s * self._dice.uniform(1.0, PUSHBACK_JITTER)

    def _backoff_s(self, call: _Call) -> float:
        longest_s = min(BACKOFF_S_MAX, BACKOFF_S * 2.0 ** min(call.failures - 1, 30))
        return longest_s * self._dice.uniform(0.5, 1.0)

    def _too_late(self, call: _Call, failure: Failure, wait_s: float) -> Unreachable:
        text = f"no answer within {call.patience_s:g} s, {call.attempts} attempts: {failure.code}: {failure}"
        if failure.code == "RESOURCE_EXHAUSTED":
            return Overloaded(text, max(0.0, wait_s), call.request_id)
        if failure.tls:
            return TlsFailed(text, failure.tls, call.request_id)
        return Unreachable(text, call.request_id)


class _Call:
    """A call under way: its deadline, its attempts, its span. Counted while it lasts."""

    def __init__(self, calls: Calls, method: str, urgency: Urgency, patience_s: float, request_id: str | None) -> None:
        self._calls = calls
        self._method = method
        self._status = "OK"
        self.urgency = urgency
        self.patience_s = patience_s
        self.request_id = request_id
        self.attempts = 0
        self.failures = 0
        self.token: Token | None = None
        self.undecided = False
        """Whether the answer is that there is no decision yet, though one was waited for."""
        self._notes: list[tuple[str, float, tracing.Attributes]] = []
        self._refusal: dict[str, str] = {}
        """Why the mesh turned away the last attempt that failed, where it did: of a call that several share, its own
        span stands in the trace of one of them."""

    def __enter__(self) -> _Call:
        calls = self._calls
        if calls.open >= OPEN_MAX:
            raise Overloaded(f"{calls.open} calls are under way already", 1.0, self.request_id)
        calls.open += 1
        calls.budget.first_attempt()
        self._started = calls._clock.monotonic()
        self._surrounding_s = deadline.remaining_s(self._started, float("inf"))
        self.start_patience()
        # Never made the current span: a stream's would leak into whatever its reader does between answers.
        self._span = calls._tracer.start_span(
            self._method,
            kind=trace.SpanKind.CLIENT,
            attributes={semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: self._method},
        )
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        calls = self._calls
        calls.open -= 1
        match error:
            case None:
                self._status = "OK"
            case CallFailed():
                self._status = error.code
            case Overloaded():
                self._status = "RESOURCE_EXHAUSTED"
            case Unreachable():
                self._status = "UNAVAILABLE" if self._status == "OK" else self._status
            case asyncio.CancelledError() | GeneratorExit():
                self._status = "CANCELLED"
            case _:
                self._status = "UNKNOWN"
        gone = isinstance(error, GeneratorExit)
        wrong = self._status if error and not gone else ""
        ended = calls._clock.monotonic()
        if self._span.is_recording():
            self._span.set_attributes({semconv.RPC_STATUS_CODE: self._status, **self._refusal})
            if wrong:
                self._span.set_attribute(semconv.ERROR_TYPE, wrong)
                self._span.set_status(trace.StatusCode.ERROR, wrong)
        elif calls._recorder and (wrong or self._notes or self.undecided):
            self._tell(calls._recorder, ended, wrong)
        self._span.end()
        calls._duration.record(
            ended - self._started, {semconv.RPC_METHOD: self._method, semconv.RPC_STATUS_CODE: self._status}
        )

    def _tell(self, recorder: tracing.Recorder, ended: float, wrong: str) -> None:
        """The span that was not recorded, since it turned out to be worth it."""
        context, parent = self._span.get_span_context(), trace.get_current_span().get_span_context()
        if not context.is_valid:
            return
        attributes: dict[str, str | int] = {
            semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: self._method, semconv.RPC_STATUS_CODE: self._status,
            semconv.ATTEMPT: self.attempts,
            semconv.KEPT_FOR: "failed" if wrong else "retried" if self._notes else "deferred", **self._refusal,
        }  # fmt: skip
        if wrong:
            attributes[semconv.ERROR_TYPE] = wrong
        within = parent.span_id if parent.trace_id == context.trace_id else 0
        recorder.tell(
            self._method, tracing.Place(context.trace_id, context.span_id), within, recorder.at(self._started),
            recorder.at(ended), kind="client", attributes=attributes, error=wrong,
            events=[(name, recorder.at(at), said) for name, at, said in self._notes],
        )  # fmt: skip

    @cached_property
    def metadata(self) -> Metadata:
        """What goes with each attempt. Made for the first: most calls of a mesh that is full are turned away before."""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(self._span))
        return (*self._calls._metadata, ("loanmesh-priority", self.urgency.name), *carrier.items())

    def note(self, name: str, said: tracing.Attributes) -> None:
        """Something that is not as it should be, for the span."""
        if self._span.is_recording():
            self._span.add_event(name, dict(said))
        elif self._calls._recorder and len(self._notes) < NOTES_MAX:
            self._notes.append((name, self._calls._clock.monotonic(), said))

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, never below zero."""
        return max(0.0, self._ends_at - self._calls._clock.monotonic())

    def start_patience(self) -> None:
        """The caller's patience begins now; a surrounding call's deadline stays where it is."""
        now = self._calls._clock.monotonic()
        self._ends_at = min(now + self.patience_s, self._started + self._surrounding_s)

    def answered(self) -> None:
        """The mesh answers: a retry that led here was no waste, and the next failure is a first one."""
        self.failures = 0
        if self.token:
            self.token.give_back()
            self.token = None

    def unsent(self) -> None:
        """The next attempt is not made after all: a retry that it was to be is paid back."""
        if self.token:
            self.token.not_used()
            self.token = None

    def failed(self, failure: Failure) -> None:
        """An attempt failed."""
        self.failures += 1
        self._status = failure.code
        said: dict[str, str | int] = {semconv.RPC_STATUS_CODE: failure.code, semconv.ATTEMPT: self.attempts}
        if failure.pushback_s is not None:
            said["loanmesh.pushback_ms"] = round(failure.pushback_s * 1000)
        self._refusal = {}
        told = self._calls._recorder or self._span.is_recording()
        if failure.code == "RESOURCE_EXHAUSTED" and told and (reason := failure.reason):
            self._refusal = {semconv.REASON: reason, semconv.CAUSE: tracing.short(str(failure))}
        self.note("attempt_failed", said)


def _is_pending(response: Any) -> bool:
    application = getattr(response, "application", None)
    return application is not None and not application.HasField("decision")
