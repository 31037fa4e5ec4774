"""A guard before one dependency: breaker and bulkhead around each call, and what both have counted.

A call first needs room: at most `at_once_max` are under way and `waiting_max` wait, first come, first served. Then it
needs the breaker's leave, asked for only now, because the breaker may have opened meanwhile and waiting must hold no
permit. Pure but for asyncio: knows neither gRPC nor HTTP, so sources and services stand behind the same piece.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Annotated, Literal, TypeVar

import structlog
from pydantic import BaseModel, Field

from loanmesh.runtime.breaker import Breaker, BreakerSettings, Change, Permit, State
from loanmesh.runtime.clock import Clock

T = TypeVar("T")
Kind = Literal["source", "service"]
log = structlog.get_logger()


class Verdict(Enum):
    """What the outcome of a call says of the dependency."""

    WELL = "well"
    """It answered, be it with a refusal that is the caller's doing."""
    ILL = "ill"
    """No answer, a broken one, or nonsense."""
    BUSY = "busy"
    """It is overloaded: a reason to ask less, not a fault."""
    NONE = "none"
    """Nothing: our own deadline or mistake."""


class Refused(Exception):
    """The call was not made. `cause` is `breaker_open` or `bulkhead_full`; `retry_s` when it makes sense to try."""

    def __init__(self, cause: str, retry_s: float) -> None:
        super().__init__(f"{cause}; try again in {retry_s:.3g} s")
        self.cause = cause
        self.retry_s = retry_s


class BulkheadSettings(BaseModel, frozen=True, extra="forbid"):
    """How much of us one dependency may hold."""

    at_once_max: Annotated[int, Field(ge=1)] = 64
    """Calls under way."""
    waiting_max: Annotated[int, Field(ge=0)] = 2000
    """Calls that wait for room; beyond, a call is turned away."""


class Guard:
    """One dependency's guard. Not for several threads: it lives on one event loop.

    name  the dependency's id, e.g. `court`.
    """

    def __init__(self, name: str, kind: Kind, breaker: Breaker, bulkhead: BulkheadSettings, clock: Clock) -> None:
        self.name = name
        self.kind = kind
        self.breaker = breaker
        self.bulkhead = bulkhead
        self._clock = clock
        self._room = asyncio.Semaphore(bulkhead.at_once_max)
        # Since when each waits; a dict keeps the order of arrival.
        self._waiting: dict[object, float] = {}
        self._call_ended = asyncio.Event()
        self._busy_at = float("-inf")
        self.in_use = 0
        """Calls under way now."""
        self.calls = self.failures = self.overloads = self.refusals = 0
        """Calls made since the start; of those, ILL and BUSY ones; and calls not made."""

    @property
    def waiting(self) -> int:
        """Calls that wait for room or for a probe's verdict."""
        return len(self._waiting)

    @property
    def wait_s_max(self) -> float:
        """How long the call that waits longest has waited, seconds; 0 where none waits. Ends with the queue."""
        return max(0.0, self._clock.monotonic() - next(iter(self._waiting.values()))) if self._waiting else 0.0

    @property
    def busy_for_s(self) -> float:
        """Seconds since the dependency last said that it is overloaded; infinite where it never did."""
        return self._clock.monotonic() - self._busy_at

    async def call(self, ask: Callable[[], Awaitable[T]], judge: Callable[[T], Verdict]) -> T:
        """The outcome of `ask`, made once there is room and leave.

        Raises Refused where there is not. What `ask` raises passes through and is no verdict: cancelled, or our bug.
        """
        permit = await self._leave()
        self.in_use += 1
        self.calls += 1
        try:
            outcome = await ask()
            match judge(outcome):
                case Verdict.WELL:
                    permit.succeed()
                case Verdict.ILL:
                    self.failures += 1
                    permit.fail()
                case Verdict.BUSY:
                    self.overloads += 1
                    self._busy_at = self._clock.monotonic()
            return outcome
        finally:
            self.in_use -= 1
            permit.release()
            self._room.release()
            self._wake()

    def force(self, state: State, cause: str) -> None:
        """Force the breaker (see there); who waits for it looks again."""
        self.breaker.force(state, cause)
        self._wake()

    async def _leave(self) -> Permit:
        """Room, and the breaker's leave; the caller gives both back."""
        # Before the queue too, so that a dead dependency costs no wait.
        if self.breaker.state in (State.OPEN, State.FORCED_OPEN) and self.breaker.refuses:
            raise self._refused("breaker_open", self.breaker.retry_in_s)
        if self._room.locked() and len(self._waiting) >= self.bulkhead.waiting_max:
            raise self._refused("bulkhead_full", 0.0)
        me = object()
        self._waiting[me] = self._clock.monotonic()
        try:
            await self._room.acquire()
            try:
                return await self._permit()
            except BaseException:
                self._room.release()
                raise
        finally:
            del self._waiting[me]

    async def _permit(self) -> Permit:
        # While probes are under way their verdict is near: waiting for it saves a whole new look.
        while (permit := self.breaker.try_acquire()) is None:
            if self.breaker.state is not State.HALF_OPEN:
                raise self._refused("breaker_open", self.breaker.retry_in_s)
            await self._call_ended.wait()
        return permit

    def _wake(self) -> None:
        # Wakes who waits now, and only those.
        self._call_ended.set()
        self._call_ended.clear()

    def _refused(self, cause: str, retry_s: float) -> Refused:
        self.refusals += 1
        return Refused(cause, retry_s)


def make_guard(
    name: str,
    kind: Kind,
    breaker: BreakerSettings,
    bulkhead: BulkheadSettings,
    clock: Clock,
    dice: random.Random,
) -> Guard:
    """A guard whose breaker logs its changes as `breaker_changed`."""

    def tell(change: Change) -> None:
        log.warning("breaker_changed", dependency=name, state=change.state.value, cause=change.cause)

    return Guard(name, kind, Breaker(breaker, clock, dice, tell), bulkhead, clock)
