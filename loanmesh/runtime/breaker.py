"""A circuit breaker to resilience4j's rules: pure, with clock and dice passed in; one for each dependency.

Closed: everything passes, and the newest `window` results count; when `minimum_calls` of them are in and too many
failed or were slow, it opens. Open: nothing passes. Half-open: begins with the first call wanted after the open time (a
breaker never probes by itself), lets `half_open_permits` through, and closes or opens again by their results. Each
opening in a row lasts longer. Overload and our own mistakes are no verdict: their permits are given back. A person may
force it open or closed.
"""

from __future__ import annotations

import datetime as dt
import random
from collections import Counter, deque
from collections.abc import Callable
from enum import Enum
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field

from loanmesh.runtime.clock import Clock

HISTORY_MAX = 50


class BreakerSettings(BaseModel, frozen=True, extra="forbid"):
    """When a breaker opens, for how long, and what closes it."""

    window: Annotated[int, Field(ge=1)] = 50
    """How many of the newest results count while closed."""
    window_s: Annotated[float, Field(gt=0)] = 60.0
    """How long a result counts, seconds: what was an hour ago says nothing of now."""
    minimum_calls: Annotated[int, Field(ge=1)] = 10
    """Results needed before a rate means anything; more than the window is read as the window."""
    failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of failed calls from which it opens."""
    slow_call_s: Annotated[float, Field(gt=0)] = 3.0
    """How long a call takes from which it counts as slow, seconds, however it ends."""
    slow_rate: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of slow calls from which it opens."""
    half_open_permits: Annotated[int, Field(ge=1)] = 3
    """Calls that may pass in half-open; their results decide, by the same rates."""
    half_open_s_max: Annotated[float, Field(gt=0)] = 30.0
    """How long probes may take, seconds, before they count as failed: a probe that never ends must not shut us out."""
    open_s: Annotated[float, Field(gt=0)] = 0.5
    """How long the first opening lasts, seconds; each further one in a row twice as long."""
    open_s_max: Annotated[float, Field(gt=0)] = 5.0
    """Longest opening before jitter, seconds. Bounds how long a source that is back goes unnoticed."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share by which an opening is made longer or shorter at random, so that replicas do not probe as one."""


class State(Enum):
    """What a breaker does with calls."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    FORCED_OPEN = "forced_open"
    FORCED_CLOSED = "forced_closed"


class Change(NamedTuple):
    """A breaker changed: when (UTC), to which state, and why."""

    at: dt.datetime
    state: State
    cause: str


class Permit:
    """Leave to make one call. Ends once, with `succeed`, `fail` or `release`; a second ending changes nothing."""

    __slots__ = ("_breaker", "_started", "_term")

    def __init__(self, breaker: Breaker, term: int, started: float) -> None:
        self._breaker: Breaker | None = breaker
        self._term = term
        self._started = started

    def succeed(self) -> None:
        """The dependency answered."""
        self._end(failed=False)

    def fail(self) -> None:
        """The dependency is at fault: no answer, a broken one, or nonsense."""
        self._end(failed=True)

    def release(self) -> None:
        """No verdict: cancelled, refused for our own mistake, or too busy for us. Another call may take its place."""
        self._end(failed=None)

    def _end(self, failed: bool | None) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker:
            breaker._end(self._term, failed, self._started)


class Breaker:
    """One dependency's breaker. Not for several threads: it lives on one event loop."""

    def __init__(
        self,
        settings: BreakerSettings,
        clock: Clock,
        dice: random.Random,
        on_change: Callable[[Change], None] | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._dice = dice
        self._on_change = on_change
        self._openings = 0
        self._open_until = 0.0
        self._probing_until = 0.0
        self._permits = 0
        # Counts state changes, so that a call begun before one has no say after it.
        self._term = 0
        self._results: deque[tuple[float, bool, bool]] = deque()
        """When it came in, whether it failed, whether it was slow; newest last."""
        self._failed = self._slow = 0
        self.state = State.CLOSED
        self.cause = "new"
        """Why it is in this state, for a person."""
        self.since = clock.now()
        """Since when it is in this state, UTC."""
        self.history: deque[Change] = deque(maxlen=HISTORY_MAX)
        """The newest changes, oldest first."""
        self.changes: Counter[State] = Counter()
        """All changes since the start, by the state they led to."""

    @property
    def refuses(self) -> bool:
        """Whether a call wanted now would be turned away. Changes nothing."""
        match self.state:
            case State.CLOSED | State.FORCED_CLOSED:
                return False
            case State.OPEN:
                return self._clock.monotonic() < self._open_until
            case State.HALF_OPEN:
                return self._permits == 0
            case State.FORCED_OPEN:
                return True

    @property
    def retry_in_s(self) -> float:
        """Seconds until a call has a chance. 0 unless open; in half-open that depends on others' calls, so 0 too.

        Where a person forced it open nobody knows; the longest opening is as good a time to look again as any.
        """
        if self.state is State.FORCED_OPEN:
            return self._settings.open_s_max
        return max(0.0, self._open_until - self._clock.monotonic()) if self.state is State.OPEN else 0.0

    @property
    def retry_at(self) -> dt.datetime:
        """When a call has a chance, UTC; now unless open."""
        return self._clock.now() + dt.timedelta(seconds=self.retry_in_s)

    def try_acquire(self) -> Permit | None:
        """Leave for one call, which must be ended; None: do not call."""
        if self.state is State.CLOSED:
            return Permit(self, self._term, self._clock.monotonic())
        if self.refuses:
            if self.state is State.HALF_OPEN and self._clock.monotonic() >= self._probing_until:
                self._open(f"probes did not end within {self._settings.half_open_s_max:g} s")
            return None
        if self.state is State.OPEN:
            self._permits = self._settings.half_open_permits
            self._probing_until = self._clock.monotonic() + self._settings.half_open_s_max
            self._change(State.HALF_OPEN, "open time is over")
        if self.state is State.HALF_OPEN:
            self._permits -= 1
        return Permit(self, self._term, self._clock.monotonic())

    def force(self, state: State, cause: str) -> None:
        """Obey a person: FORCED_OPEN and FORCED_CLOSED stay until the next order, CLOSED follows the rules again."""
        if state not in (State.CLOSED, State.FORCED_OPEN, State.FORCED_CLOSED):
            raise ValueError(f"nobody can force a breaker into {state.value}")
        self._openings = 0
        self._change(state, cause)

    def _end(self, term: int, failed: bool | None, started: float) -> None:
        if term != self._term or self.state is State.FORCED_CLOSED:
            return
        if failed is None:
            # Returned, or a few cancelled probes would shut a healthy dependency out for good.
            self._permits += self.state is State.HALF_OPEN
            # It did end, if without a verdict: whoever takes its place has the whole time.
            self._probing_until = self._clock.monotonic() + self._settings.half_open_s_max
            return
        now = self._clock.monotonic()
        probing = self.state is State.HALF_OPEN
        size = self._settings.half_open_permits if probing else self._settings.window
        enough = size if probing else min(self._settings.minimum_calls, size)
        self._count(now, failed, now - started >= self._settings.slow_call_s, size)
        if len(self._results) < enough:
            return
        if cause := self._too_bad():
            self._open(cause)
        elif probing:
            self._openings = 0
            self._change(State.CLOSED, f"{size} probes passed")

    def _count(self, now: float, failed: bool, slow: bool, size: int) -> None:
        too_old = now - self._settings.window_s
        results = self._results
        # Probes do not age: they are few, and `half_open_s_max` bounds them.
        while results and (len(results) == size or (results[0][0] <= too_old and self.state is State.CLOSED)):
            _, old_failed, old_slow = results.popleft()
            self._failed -= old_failed
            self._slow -= old_slow
        results.append((now, failed, slow))
        self._failed += failed
        self._slow += slow

    def _too_bad(self) -> str:
        calls = len(self._results)
        if self._failed >= self._settings.failure_rate * calls:
            return f"{self._failed} of {calls} calls failed"
        if self._slow >= self._settings.slow_rate * calls:
            return f"{self._slow} of {calls} calls took {self._settings.slow_call_s:g} s or longer"
        return ""

    def _open(self, cause: str) -> None:
        longest = self._settings.open_s_max
        # The exponent is bounded: a source dead for a week must not overflow a float.
        lasts = min(longest, self._settings.open_s * 2.0 ** min(self._openings, 30))
        self._openings += 1
        jitter = self._settings.jitter
        self._open_until = self._clock.monotonic() + lasts * self._dice.uniform(1 - jitter, 1 + jitter)
        self._change(State.OPEN, cause)

    def _change(self, state: State, cause: str) -> None:
        self._term += 1
        self._results.clear()
        self._failed = self._slow = 0
        self.state, self.cause, self.since = state, cause, self._clock.now()
        change = Change(self.since, state, cause)
        self.history.append(change)
        self.changes[state] += 1
        if self._on_change:
            self._on_change(change)
