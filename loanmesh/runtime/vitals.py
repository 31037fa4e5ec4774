"""What a process knows of itself, in one place: read by the ops RPC and by the metrics, so that both say the same.

Main fills it in while it puts the service together. Nothing here asks a dependency; what takes time is sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import structlog

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.degradation import Step
from loanmesh.runtime.errors import NotNow
from loanmesh.runtime.guard import Guard

SAMPLE_EVERY_S = 1.0
BACKLOG_EVERY = 5
"""The backlog is counted each so many samples: counting it is a query."""
log = structlog.get_logger()


class Queue(NamedTuple):
    """A queue in memory, with its bound."""

    name: str
    length: Callable[[], int]
    limit: int


@dataclass
class Vitals:
    """One process. Empty lists where a service has no such thing."""

    guards: list[Guard] = field(default_factory=list)
    """One a dependency, in the order in which they are listed."""
    queues: list[Queue] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    """Degradation steps, least harm first."""
    count_backlog: Callable[[], Awaitable[int]] | None = None
    """Counts what is stored and not decided. May raise NotNow: then the last count stands."""
    backlog: int | None = None
    """The last count."""
    decisions: Counter[str] = field(default_factory=Counter)
    """Decisions committed since the start, by outcome."""
    degradations: Counter[str] = field(default_factory=Counter)
    """Decisions that a step shaped, by `step` or `step:subject`."""
    parked: Counter[str] = field(default_factory=Counter)
    """Applications parked since the start, by the stage that they broke."""
    draining: bool = False

    async def sample_forever(self, clock: Clock) -> None:
        """Let go of steps that nobody asks for any more, and count the backlog; ends by cancellation only."""
        rounds = 0
        while True:
            for step in self.steps:
                step.check()
            if self.count_backlog and rounds % BACKLOG_EVERY == 0:
                try:
                    self.backlog = await self.count_backlog()
                except NotNow as error:
                    log.warning("backlog_unknown", error=str(error))
            rounds += 1
            await clock.sleep(SAMPLE_EVERY_S)
