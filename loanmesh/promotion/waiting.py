"""What is accepted and not decided: counted by when it came and how urgent it is, not followed one by one. Pure."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

PRIORITIES = ("interactive", "partner", "bulk")
"""Most urgent first."""
BY_AGE = 0.2
"""Share of the places that go by age alone, as intake's worker and store have it."""


class Waiting:
    """What is accepted and not decided, as (when it came, how many), by class."""

    def __init__(self) -> None:
        self._classes: list[deque[list[float]]] = [deque() for _ in PRIORITIES]
        self.count = 0.0

    def add(self, priority: int, at_s: float, count: float) -> None:
        """So many of a class have come."""
        if count > 0:
            self._classes[priority].append([at_s, count])
            self.count += count

    def oldest_at_s(self, otherwise: float) -> float:
        """When the one came that has waited for longest."""
        return min((queue[0][0] for queue in self._classes if queue), default=otherwise)

    def take(self, count: float) -> list[tuple[float, float]]:
        """The next `count`, as (when they came, how many)."""
        taken: list[tuple[float, float]] = []
        by_age = min(count, self.count) * BY_AGE
        while by_age > 1e-9 and (oldest := min((q for q in self._classes if q), key=lambda q: q[0][0], default=None)):
            by_age -= self._from(oldest, by_age, taken)
        left = min(count - sum(part for _, part in taken), self.count)
        for queue in self._classes:
            while left > 1e-9 and queue:
                left -= self._from(queue, left, taken)
        return taken

    def _from(self, queue: deque[list[float]], count: float, taken: list[tuple[float, float]]) -> float:
        first = queue[0]
        part = min(count, first[1])
        first[1] -= part
        if first[1] <= 1e-9:
            queue.popleft()
        self.count = self.count - part if any(self._classes) else 0.0
        taken.append((first[0], part))
        return part


def percentiles(waits: Sequence[tuple[float, float]]) -> dict[str, float]:
    """p50, p90, p99 and the longest of waits with how many waited so long; zeros where nobody did."""
    ordered = sorted(waits)
    if not ordered:
        return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "max": 0.0}
    sums = list(accumulate(count for _, count in ordered))

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, bisect.bisect_left(sums, share * sums[-1]))][0]

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": ordered[-1][0]}
