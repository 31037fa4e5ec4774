"""What Kubernetes' HorizontalPodAutoscaler makes of a metric, with the behaviour that our manifests set. Pure.

The rules are those of the autoscaling/v2 controller: a metric with an average target asks for total over target; within
the tolerance nothing changes; of several metrics the largest counts; going down waits for the largest proposal of the
stabilisation window; and policies bound how much may change within a period.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

SYNC_S = 15.0
"""How often the controller looks."""
TOLERANCE = 0.1
"""As the controller has it by default."""


@dataclass(frozen=True)
class Behaviour:
    """How fast replicas may change; as in deploy/k8s."""

    up_percent: float = 200.0
    up_pods: int = 4
    up_period_s: float = 15.0
    down_percent: float = 10.0
    down_period_s: float = 60.0
    down_window_s: float = 300.0
    """Going down waits until nothing asked for more within so many seconds."""

    def grown(self, replicas: int) -> int:
        """How many there may be a period after there were so many."""
        return max(replicas + self.up_pods, math.ceil(replicas * (1 + self.up_percent / 100)))

    def shrunk(self, replicas: int) -> int:
        """How few there may be a period after there were so many."""
        return int(replicas * (1 - self.down_percent / 100))

    def climb_s(self, low: int, high: int) -> float:
        """Seconds from the first look until the controller has asked for `high` where there were `low`."""
        looks = 0
        while low < high:
            low, looks = self.grown(low), looks + 1
        return looks * max(SYNC_S, self.up_period_s)


class Autoscaler:
    """One HorizontalPodAutoscaler. Times are seconds that never go back."""

    def __init__(self, least: int, most: int, behaviour: Behaviour | None = None) -> None:
        self._least = least
        self._most = most
        self._behaviour = behaviour or Behaviour()
        self._proposals: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()

    def replicas(self, now: float, current: int, totals: Iterable[float]) -> int:
        """How many replicas there should be, where there are `current`.

        totals  each metric's total in replicas: a metric over its average target.
        """
        proposal = max([self._least, *(self._proposed(current, total) for total in totals)])
        proposal = min(self._most, proposal)
        self._proposals.append((now, proposal))
        while self._proposals[0][0] < now - self._behaviour.down_window_s:
            self._proposals.popleft()
        stable = max(count for _, count in self._proposals)
        wanted = proposal if proposal > current else min(current, stable)
        allowed = self._allowed(now, current, wanted)
        if allowed != current:
            self._changes.append((now, allowed - current))
        return allowed

    def _proposed(self, current: int, total: float) -> int:
        if current and abs(total / current - 1) <= TOLERANCE:
            return current
        return math.ceil(total - 1e-9)

    def _allowed(self, now: float, current: int, wanted: int) -> int:
        behaviour = self._behaviour
        longest_s = max(behaviour.up_period_s, behaviour.down_period_s)
        while self._changes and self._changes[0][0] <= now - longest_s:
            self._changes.popleft()
        if wanted > current:
            return max(current, min(wanted, behaviour.grown(current - self._changed(now, behaviour.up_period_s))))
        if wanted < current:
            return min(current, max(wanted, behaviour.shrunk(current - self._changed(now, behaviour.down_period_s))))
        return current

    def _changed(self, now: float, period_s: float) -> int:
        return sum(change for at, change in self._changes if at > now - period_s)
