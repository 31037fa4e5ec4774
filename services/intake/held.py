"""The applications a replica holds in memory: most urgent class first, and none starved. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

from services.intake.application import Claim

AGED_SHARE = 5
"""One place in five of a batch goes by age alone, so that low classes move even under a flood of urgent work."""


class Held:
    """Leased applications that wait for a batch."""

    def __init__(self) -> None:
        self._classes: dict[int, deque[Claim]] = {}
        self._arrivals: deque[tuple[float, int]] = deque()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Claim]:
        return (claim for _, waiting in sorted(self._classes.items()) for claim in waiting)

    def add(self, claims: Sequence[Claim], now: float) -> None:
        """More of them, each class in order of age; `now` is in monotonic seconds."""
        for claim in claims:
            self._classes.setdefault(claim.priority, deque()).append(claim)
        self._count += len(claims)
        self._arrivals.append((now, len(claims)))

    def came_first_at(self) -> float:
        """When the first of as many as wait now came at the earliest (monotonic seconds); infinity where none waits.

        Counted, not followed one by one: those that came last may be taken first, and then this reads too late.
        """
        return self._arrivals[0][0] if self._arrivals else float("inf")

    def take(self, at_most: int) -> list[Claim]:
        """The next ones: by class, then by age; one place in five by age alone."""
        by_age = at_most // AGED_SHARE
        taken = [self._pop(self._most_urgent()) for _ in range(min(self._count, at_most - by_age))]
        taken += [self._pop(self._oldest()) for _ in range(min(self._count, by_age))]
        self._left(len(taken))
        return taken

    def keep(self, ids: Collection[str]) -> None:
        """Drop all but these."""
        before = self._count
        for priority, waiting in self._classes.items():
            self._classes[priority] = deque(claim for claim in waiting if claim.id in ids)
        self._count = sum(len(waiting) for waiting in self._classes.values())
        self._left(before - self._count)

    def _most_urgent(self) -> int:
        return min(priority for priority, waiting in self._classes.items() if waiting)

    def _oldest(self) -> int:
        return min((waiting[0].not_before, priority) for priority, waiting in self._classes.items() if waiting)[1]

    def _pop(self, priority: int) -> Claim:
        self._count -= 1
        return self._classes[priority].popleft()

    def _left(self, count: int) -> None:
        while count and self._arrivals:
            at, size = self._arrivals.popleft()
            if size > count:
                self._arrivals.appendleft((at, size - count))
            count = max(0, count - size)
