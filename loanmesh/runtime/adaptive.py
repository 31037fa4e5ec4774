"""A limit on calls in flight that finds out by itself what the other side can take. Pure.

Shaped after Netflix's concurrency-limits: it grows only while at least half of it is used, shrinks by 0.9 for a little
too much and never by more than half. Like TCP, it doubles a round trip until the first sign of a queue, and shrinks at
most once a round trip: only a call sent after the last change says anything about it.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, Field

from loanmesh.runtime.clock import Clock

SHRINK_LEAST, SHRINK_MOST = 0.9, 0.5
DRIFT_PER_S = 0.001
"""How fast the least latency is forgotten, a share a second: a mesh that became slower for good is the new normal
after minutes, a queue of seconds is not."""


class AdaptiveSettings(BaseModel, frozen=True, extra="forbid"):
    """Bounds of the limit, and when a queue is too long."""

    initial: Annotated[int, Field(ge=1)] = 2
    """Calls in flight to begin with. Netflix begins with 20, in a server; of callers hundreds may begin at once. It
    doubles each round trip until the first sign of a queue."""
    floor: Annotated[int, Field(ge=1)] = 2
    """Never fewer: one call that hangs must not stop all others."""
    ceiling: Annotated[int, Field(ge=1)] = 256
    """Never more. Beyond 64 to 256 in flight one intake gained nothing (1,203 and 1,707 a second)."""
    target_s: Annotated[float, Field(gt=0)] = 0.1
    """Queue delay up to which the limit may grow, seconds. Larger fills every gap; smaller answers sooner."""


class AdaptiveLimit:
    """The limit as a number that learns from each call."""

    def __init__(self, settings: AdaptiveSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._limit = float(min(max(settings.initial, settings.floor), settings.ceiling))
        self._starting = True
        self._shrunk_at = self._calm_at = float("-inf")
        self._least_s = math.inf
        self._least_at = 0.0

    @property
    def calls(self) -> int:
        """Calls that may be in flight now."""
        return int(self._limit)

    def delay_s(self, latency_s: float) -> float:
        """How much of a latency is queue: what exceeds the least one seen. Remembers it."""
        now = self._clock.monotonic()
        least_s = self._least_s * (1 + DRIFT_PER_S * (now - self._least_at)) if self._least_s < math.inf else math.inf
        self._least_s, self._least_at = min(latency_s, least_s), now
        return latency_s - self._least_s

    def answered(self, sent_at: float, in_flight: int, delay_s: float | None) -> None:
        """A call was answered. `in_flight` counts calls when it was sent; `delay_s` None: nothing known of a queue."""
        target_s = self._settings.target_s
        if delay_s is not None and delay_s > target_s:
            # In proportion, so that a limit left over from calmer days comes down within a few round trips.
            self._shrink(sent_at, min(SHRINK_LEAST, max(SHRINK_MOST, target_s / delay_s)))
            return
        if delay_s is not None:
            self._calm_at = self._clock.monotonic()
        if in_flight * 2 >= self._limit:
            # Else the limit was not tried, and its success says nothing.
            step = 1.0 if self._starting else 1 / math.sqrt(self._limit)
            self._limit = min(float(self._settings.ceiling), self._limit + step)

    def refused(self, sent_at: float) -> None:
        """A call was turned away as too much."""
        self._shrink(sent_at, SHRINK_MOST)

    def timed_out(self, sent_at: float) -> None:
        """A call was not answered in time. No sign of too much while others are answered without a queue: then one
        replica of several hangs, and the rest can do with all the calls they get."""
        if self._calm_at < sent_at:
            self._shrink(sent_at, SHRINK_MOST)

    def _shrink(self, sent_at: float, factor: float) -> None:
        if sent_at < self._shrunk_at:
            return
        self._limit = max(float(self._settings.floor), self._limit * factor)
        self._starting = False
        self._shrunk_at = self._clock.monotonic()
