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
        self._fences: dict[str, int] = {}
        self._aged = 0.0

    def __len__(self) -> int:
        return len(self._fences)

    def __iter__(self) -> Iterator[Claim]:
        return (claim for _, waiting in sorted(self._classes.items()) for claim in waiting)

    def add(self, claims: Sequence[Claim], now: float) -> None:
        """More of them, each class in order of age; `now` is in monotonic seconds.

        Of two leases on one application the newer is held: the older one was lost.
        """
        if not claims:
            return
        newer = [claim for claim in claims if claim.fence > self._fences.get(claim.id, 0)]
        if lost := {claim.id for claim in newer if claim.id in self._fences}:
            self.keep({lease for lease in self._fences.items() if lease[0] not in lost})
        for claim in newer:
            self._classes.setdefault(claim.priority, deque()).append(claim)
            self._fences[claim.id] = claim.fence
        self._arrivals.append((now, len(newer)))

    def came_first_at(self) -> float:
        """When the first of as many as wait now came at the earliest (monotonic seconds); infinity where none waits.

        Counted, not followed one by one: those that came last may be taken first, and then this reads too late.
        """
        return self._arrivals[0][0] if self._arrivals else float("inf")

    def take(self, at_most: int) -> list[Claim]:
        """The next ones: by class, then by age; one place in five by age alone."""
        # The rest is carried on: under a pace a batch is often smaller than five.
        self._aged += at_most / AGED_SHARE
        by_age = int(self._aged)
        self._aged -= by_age
        taken = [self._pop(self._most_urgent()) for _ in range(min(len(self), at_most - by_age))]
        taken += [self._pop(self._oldest()) for _ in range(min(len(self), by_age))]
        self._left(len(taken))
        return taken

    def keep(self, leases: Collection[tuple[str, int]]) -> None:
        """Drop all but those of these leases, (id, fence)."""
        before = len(self)
        for priority, waiting in self._classes.items():
            self._classes[priority] = deque(claim for claim in waiting if (claim.id, claim.fence) in leases)
        self._fences = {claim.id: claim.fence for claim in self}
        self._left(before - len(self))

    def _most_urgent(self) -> int:
        return min(priority for priority, waiting in self._classes.items() if waiting)

    def _oldest(self) -> int:
        return min((waiting[0].not_before, priority) for priority, waiting in self._classes.items() if waiting)[1]

    def _pop(self, priority: int) -> Claim:
        claim = self._classes[priority].popleft()
        del self._fences[claim.id]
        return claim

    def _left(self, count: int) -> None:
        while count and self._arrivals:
            at, size = self._arrivals.popleft()
            if size > count:
                self._arrivals.appendleft((at, size - count))
            count = max(0, count - size)
