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
from loanmesh.runtime.lasting import Lasting

SAMPLE_EVERY_S = 1.0
BACKLOG_EVERY = 5
"""The backlog is counted each so many samples: counting it is a query."""
LOOK_SHARE = 0.02
"""Share of the time that may go into looking how the store stands."""
log = structlog.get_logger()


class Decision(NamedTuple):
    """What a decision is counted by: the segments of which an approval rate is asked. Few values each, no ids."""

    outcome: str
    product: str
    grade: str


class Resting(NamedTuple):
    """Applications that rest until it is time to try them again, for one reason."""

    waiting_for: str
    """What they wait for, e.g. `source_missing:court`; several with commas between."""
    applications: int
    retry_at: float
    """When the first of them is tried again, seconds since 1970."""


class Standing(NamedTuple):
    """How the store stands: what it holds that is not decided. All replicas on a store see the same."""

    backlog_age_s: float
    """How long the first in line, of those that could be worked on now, has been waiting for its turn; 0: none is."""
    pending_age_s: float
    """How long ago the oldest application that waits for us alone was acknowledged; 0: none does."""
    unowned: int
    """Applications that are due, and whose owner let its lease end longer than a poll ago: nobody took them over."""
    parked: int
    """Applications set aside until a person has looked."""
    resting: tuple[Resting, ...] = ()
    """By reason, the most frequent first; the rare ones are left out."""


@dataclass
class SourceFigures:
    """What became of asking one source, since the start."""

    query_fen: int = 0
    """What a query costs by contract, fen."""
    reports: Counter[str] = field(default_factory=Counter)
    """Reports in profiles, by state: fresh, not_found, stale, missing, no_consent."""
    answered: int = 0
    """Queries that it answered, and bills."""
    observed_at: float | None = None
    """When the newest evidence that was used was true at the source, seconds since 1970."""

    def used(self, observed_at: float) -> None:
        """Evidence of that time went into a profile."""
        self.observed_at = max(observed_at, self.observed_at or observed_at)


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
    look: Callable[[], Awaitable[Standing]] | None = None
    """Looks how the store stands: a query. May raise NotNow: then the last look stands."""
    standing: Standing | None = None
    """The last look."""
    offered: Counter[str] = field(default_factory=Counter)
    """Applications that came to the door since the start, by priority."""
    accepted: Counter[str] = field(default_factory=Counter)
    """Applications stored and acknowledged since the start, by priority; one sent again does not count again."""
    sources: dict[str, SourceFigures] = field(default_factory=dict)
    """By source."""
    decisions: Counter[Decision] = field(default_factory=Counter)
    """Decisions committed since the start."""
    degradations: Counter[str] = field(default_factory=Counter)
    """Decisions that a step shaped, by `step` or `step:subject`."""
    parked: Counter[str] = field(default_factory=Counter)
    """Applications parked since the start, by the stage that they broke."""
    draining: bool = False

    async def sample_forever(self, clock: Clock) -> None:
        """Let go of steps that nobody asks for any more, and count the backlog; ends by cancellation only."""
        rounds = 0
        look_at = clock.monotonic()
        steps, backlog, standing = Lasting("steps"), Lasting("backlog"), Lasting("standing")
        while True:
            with steps:
                for step in self.steps:
                    step.check()
            if self.count_backlog and rounds % BACKLOG_EVERY == 0:
                with backlog:
                    try:
                        self.backlog = await self.count_backlog()
                    except NotNow as error:
                        log.warning("backlog_unknown", error=str(error))
            if self.look and clock.monotonic() >= look_at:
                began = clock.monotonic()
                with standing:
                    try:
                        self.standing = await self.look()
                    except NotNow as error:
                        log.warning("standing_unknown", error=str(error))
                # A long backlog takes a while to look at: what it costs stays a small share.
                took_s = clock.monotonic() - began
                look_at = began + max(BACKLOG_EVERY * SAMPLE_EVERY_S, took_s / LOOK_SHARE)
            rounds += 1
            await clock.sleep(SAMPLE_EVERY_S)
