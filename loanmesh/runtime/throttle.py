"""How many calls a caller keeps in flight: as many as the other side answers without a queue, found by trying.

A Python server cannot shed its way out of overload, for refusing costs it as much as answering (measured: 0.36 to 0.47
ms against 0.43 ms); so who calls must hold back. Measured at 6.5 times the load: 25 % of the peak without, 93 to 100 %
with an in-flight limit in the client.

`Throttle` is the queue in front of an `AdaptiveLimit` and of `Gates`. What those learn from are queue delay (told by
the server, or latency above the least one seen), refusals and calls that ran out of time.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from loanmesh.runtime.adaptive import AdaptiveLimit, AdaptiveSettings
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import Overloaded
from loanmesh.runtime.gates import Gates

SMOOTH = 0.1
"""Weight of the newest call in the mean of how long permits are held."""
USUAL = 2
"""Of that mean, within which most answers come."""
TOGETHER_MOST = 64
"""In flight together at most, all places of a limit counted: it was found by trying calls for one, and sixteen times as
many in each place would be a queue before anybody knew of it."""


class ThrottleSettings(AdaptiveSettings, frozen=True, extra="forbid"):
    """The limit's, and the queue's."""

    waiting_max: Annotated[int, Field(ge=0)] = 10_000
    """Calls that wait here at most; beyond, the least urgent is turned away."""


COMPANY = AdaptiveSettings(initial=16, ceiling=16, floor=1, target_s=0.5)
"""How many of those that wait have a place in flight together. Many in a call are what makes the other side fast: fifty
small callers with ten times the load had 1,300 to 1,550 a second acknowledged in time with 1, 2,850 with 8, 3,600 with
16. Fewer where a queue is long all the same: the limit is at its floor by then, and only their size is left to shrink.
With 16 at all times, callers of a mesh that took 950 a second had answers after 1.8 s, and half of them too late."""


class _Place:
    """A place in flight, and those who have it together."""

    __slots__ = ("company", "counted", "in_flight", "left", "sent_at", "urgency")

    def __init__(self, urgency: int, company: int, in_flight: int, sent_at: float) -> None:
        self.urgency = urgency
        self.company = self.left = company
        self.in_flight = in_flight
        self.sent_at = sent_at
        self.counted = False
        """Whether an answer of theirs was learned from: together they are one call."""


class Permit:
    """Leave to have one call in flight, or a share in one. Ends once, by one of the four; a second ending changes
    nothing."""

    __slots__ = ("_place", "_throttle")

    def __init__(self, throttle: Throttle, place: _Place) -> None:
        self._throttle: Throttle | None = throttle
        self._place = place

    @property
    def company(self) -> int:
        """How many got this place together, itself included: they are to go as one call."""
        return self._place.company

    def answered(self, queue_s: float | None = None, *, timely: bool = True) -> None:
        """The call was answered.

        queue_s  how long the server says it queued; None: it did not say.
        timely   False where the latency says nothing of a queue, since the call also waited for something else.
        """
        if throttle := self._end():
            place = self._place
            if not place.counted:
                place.counted = True
                held_s = throttle._clock.monotonic() - place.sent_at
                throttle._held(held_s)
                if timely:
                    # What the server tells of is behind its door; what waits before it shows in the latency alone.
                    queue_s = max(queue_s or 0.0, throttle.limit.delay_s(held_s))
                throttle.limit.answered(place.sent_at, place.in_flight, queue_s)
                throttle._size.answered(place.sent_at, place.company, queue_s)
            throttle.gates.answered(place.urgency)
            throttle._wake()

    def refused(self, away_s: float | None = None, *, yields: bool = False) -> None:
        """The call was turned away as too much.

        away_s  for how long no such call is wanted; None: not said.
        yields  whether for the sake of those who are in more of a hurry.
        """
        if throttle := self._end():
            throttle.limit.refused(self._place.sent_at)
            if throttle.gated:
                throttle.gates.refused(self._place.urgency, self._place.sent_at, away_s, yields=yields)
            throttle._wake()

    def timed_out(self) -> None:
        """The call was not answered in time."""
        if throttle := self._end():
            throttle.limit.timed_out(self._place.sent_at)
            throttle._size.timed_out(self._place.sent_at)
            throttle._wake()

    def release(self) -> None:
        """No verdict: cancelled, or the other side was not there."""
        if throttle := self._end():
            if not self._place.left:
                throttle.gates.unheard(self._place.urgency)
            throttle._wake()

    def _end(self) -> Throttle | None:
        throttle, self._throttle = self._throttle, None
        if throttle:
            self._place.left -= 1
            if not self._place.left:
                throttle._flying[self._place.urgency] -= 1
        return throttle


class Throttle:
    """Lets calls through up to the limit; the others wait, the most urgent first, or are told at once that waiting
    cannot help. For one event loop.

    classes  how many classes of urgency there are; 0 is the most urgent.
    gated    whether a class that is turned away stays away: for calls of one kind, of which all are told the same.
    company  whether those that wait can go as one call, and have a place together.
    """

    def __init__(
        self,
        settings: ThrottleSettings,
        clock: Clock,
        classes: int = 3,
        *,
        gated: bool = True,
        company: Callable[[], bool] = lambda: False,
    ) -> None:
        self._settings = settings
        self._clock = clock
        # Ordered, and cheap to leave from the middle: thousands may run out of time together.
        # Each with the time by which its caller wants an answer.
        self._waiting: list[OrderedDict[asyncio.Future[Permit], float]] = [OrderedDict() for _ in range(classes)]
        self._flying = [0] * classes
        self._held_s = 0.0
        self.limit = AdaptiveLimit(settings, clock)
        self.gated = gated
        self._company = company
        self._size = AdaptiveLimit(COMPANY, clock)
        self.gates = Gates(classes, clock)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    @property
    def in_flight(self) -> int:
        """Calls that are sent and not ended; those that go together are one."""
        return sum(self._flying)

    @property
    def waiting(self) -> int:
        """Calls that wait."""
        return sum(len(queue) for queue in self._waiting)

    @property
    def usual_s(self) -> float:
        """Within how many seconds most answers come now; 0 while nothing is known."""
        return self._held_s * USUAL

    def expected_wait_s(self, urgency: int) -> float:
        """Seconds that a call of this class that came now would probably wait: those before it, at the pace at which
        permits come back. 0 while nothing is known."""
        *before, own = self._waiting[: urgency + 1]
        shut_s = self.gates.shut_s(urgency)
        if not own and not any(before) and self.in_flight < self.limit.calls:
            return shut_s
        turns = sum(math.ceil(len(queue) / self._together(rank)) for rank, queue in enumerate(before))
        turns += len(own) // self._together(urgency) + 1
        return max(shut_s, turns * self._held_s / self.limit.calls)

    async def acquire(self, urgency: int, within_s: float) -> Permit:
        """Leave for one call, to be ended. Raises Overloaded where it would not come, or did not come, in time;
        `retry_s` is then the wait that was to be expected."""
        if not any(self._waiting[: urgency + 1]) and self._has_room(urgency):
            return Permit(self, self._place(urgency, 1))
        expected_s = self.expected_wait_s(urgency)
        # Its turn alone would be of no use: the answer takes as long again as answers take now.
        if expected_s + (self._held_s if self.in_flight else 0.0) > within_s:
            raise Overloaded(
                f"about {expected_s:.1f} s until this call's turn, and {max(0.0, within_s):.1f} s left", expected_s
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Permit] = loop.create_future()
        self._make_room(urgency, expected_s)
        self._waiting[urgency][future] = self._clock.monotonic() + within_s
        self._set_timer()
        # Half of what a timeout around the wait costs, and thousands may run out of time together.
        too_late = loop.call_later(within_s, self._give_up, future, urgency, within_s)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().release()
            raise
        finally:
            too_late.cancel()
            self._waiting[urgency].pop(future, None)
            del future  # What it raised leads back here: a cycle, for the collector, of each call that gives up.

    def _give_up(self, future: asyncio.Future[Permit], urgency: int, within_s: float) -> None:
        self._waiting[urgency].pop(future, None)
        if not future.done():
            future.set_exception(Overloaded(f"no turn within {within_s:.1f} s", self.expected_wait_s(urgency)))

    def _make_room(self, urgency: int, expected_s: float) -> None:
        """Where the queue is full, turn away the newest of the least urgent: whoever waits or whoever comes."""
        if self.waiting < self._settings.waiting_max:
            return
        for queue in reversed(self._waiting[urgency + 1 :]):
            if queue:
                future, _ = queue.popitem()
                if not future.done():  # Else it just gave up, and its task has not run yet.
                    future.set_exception(Overloaded("more urgent calls took its place", expected_s))
                return
        raise Overloaded(f"{self.waiting} calls wait already", expected_s)

    def _has_room(self, urgency: int) -> bool:
        """Whether one more of the class may be in flight. The last place is kept for the most urgent: under overload
        the limit is small, and who waits in front of a screen must not wait for calls that nobody is in a hurry for."""
        if self.gates.opens_s(urgency):
            return False
        return self.in_flight < max(1, self.limit.calls - (urgency > 0))

    def _place(self, urgency: int, company: int) -> _Place:
        self._flying[urgency] += 1
        self.gates.sent(urgency)
        # The place kept for the most urgent counts as used: who may never have it would else never find out that there
        # is room for more.
        return _Place(urgency, company, self.in_flight + (urgency > 0), self._clock.monotonic())

    def _held(self, seconds: float) -> None:
        self._held_s += (seconds - self._held_s) * (SMOOTH if self._held_s else 1.0)

    def _wake(self) -> None:
        for urgency, queue in enumerate(self._waiting):
            while queue and self._has_room(urgency):
                if boarding := self._next(queue, self._together(urgency)):
                    place = self._place(urgency, len(boarding))
                    for future in boarding:
                        future.set_result(Permit(self, place))
        self._set_timer()

    def _together(self, urgency: int) -> int:
        """How many of a class may have the next place together."""
        if not self._company() or not self.gates.welcome(urgency):
            return 1
        return max(1, min(self._size.calls, TOGETHER_MOST // self.limit.calls))

    def _next(self, queue: OrderedDict[asyncio.Future[Permit], float], most: int) -> list[asyncio.Future[Permit]]:
        """Those of a class who get the next place, taken from the queue; whose turn comes too late is told so."""
        now = self._clock.monotonic()
        boarding: list[asyncio.Future[Permit]] = []
        while queue and len(boarding) < most:
            future, ends_at = queue.popitem(last=False)
            if future.done():
                continue
            if (self.in_flight or boarding) and ends_at - now < self.usual_s:
                # The mesh would do the work, and nobody would hear of it. While none is in flight one is sent
                # all the same: else nobody would ever learn that answers take less time again.
                future.set_exception(
                    Overloaded(f"its turn came too late: answers take {self._held_s:.1f} s", self._held_s)
                )
                continue
            boarding.append(future)
        return boarding

    def _set_timer(self) -> None:
        """Be there when the first gate opens that somebody waits for."""
        times_s = [self.gates.opens_s(urgency) for urgency, queue in enumerate(self._waiting) if queue]
        opens_s = min((seconds for seconds in times_s if seconds), default=None)
        if opens_s is None:
            return
        # Loops that count in milliseconds come a little early; who comes too early sets it again.
        loop, opens_s = asyncio.get_running_loop(), opens_s + 0.001
        at = loop.time() + opens_s
        if self._timer:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer, self._timer_at = loop.call_later(opens_s, self._ring), at

    def _ring(self) -> None:
        self._timer = None
        self._wake()
