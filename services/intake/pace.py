"""How fast a replica may begin applications when a source or a service says that it is too busy. Pure.

A rate, not a number under way: a source over its quota turns work away within milliseconds, so that any number under
way would try it hundreds of times a second. Without a limit, a backlog that waits for a quota would be tried again and
again as a whole, and each try costs the other sources and us the work of a decision.
"""

from __future__ import annotations

from collections import deque

TOLERATED = 0.1
"""Share of a batch that may be turned away before we slow down: where a quota ends is only found by touching it."""
WINDOW_S = 1.0
"""Over how long answers are counted, seconds; also the shortest time between two decreases."""
STEP_S = 0.5
"""How often the rate grows while nothing is turned away."""
GROWTH_FIRST, GROWTH_MOST = 0.02, 0.5
"""First growth after a decrease. It doubles at each step: a busy source's edge is felt for, a freed one refilled."""
LEAST_A_SECOND = 1.0
FREE_A_SECOND = 5000.0
"""Above this no limit is kept: one replica does not decide so many."""


class Pace:
    """A token bucket whose rate follows what the mesh answers; unlimited until something is turned away.

    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._tokens = 0.0
        self._filled_at = 0.0
        self._decreased_at = self._stepped_at = float("-inf")
        self._growth = GROWTH_FIRST
        self._answers: deque[tuple[float, int]] = deque()

    @property
    def a_second(self) -> float | None:
        """Applications that may begin a second; None: as many as can."""
        return self._rate

    def allowance(self, now: float, wanted: int) -> int:
        """How many of `wanted` may begin now."""
        if self._rate is None:
            return wanted
        self._grow(now)
        if self._rate is None:
            return wanted
        # A tenth of a second's worth may gather: enough for a batch, too little for a burst.
        most = max(1.0, self._rate / 10)
        self._tokens = min(most, self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        return min(wanted, int(self._tokens))

    def begun(self, count: int) -> None:
        """So many have begun."""
        if self._rate is not None:
            self._tokens -= count

    def ended(self, answered: int, overloaded: int, started_at: float, now: float) -> None:
        """A batch begun at `started_at` has ended: so many were answered, so many turned away as too much."""
        self._answers.append((now, answered))
        while self._answers[0][0] < now - WINDOW_S:
            self._answers.popleft()
        # A batch begun before the last decrease tells of the rate before it.
        late = self._rate is not None and started_at < self._decreased_at
        if overloaded <= (answered + overloaded) * TOLERATED or late:
            return
        self._growth, self._stepped_at = GROWTH_FIRST, now
        if now < self._decreased_at + WINDOW_S:
            return
        reached = sum(count for _, count in self._answers) / WINDOW_S
        self._rate = max(LEAST_A_SECOND, reached if self._rate is None else min(reached, self._rate))
        self._tokens = 0.0
        self._filled_at = self._decreased_at = now

    def _grow(self, now: float) -> None:
        while self._rate is not None and now >= self._stepped_at + STEP_S:
            self._rate *= 1 + self._growth
            self._growth = min(GROWTH_MOST, self._growth * 2)
            self._stepped_at += STEP_S
            if self._rate > FREE_A_SECOND:
                self._rate = None
