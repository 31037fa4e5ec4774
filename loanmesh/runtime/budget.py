"""A retry budget: how many repeated calls a client may add to those it makes anyway. Pure, with the clock passed in.

Without one, n attempts a call make n times the load just when the mesh can bear it least. With it, retries that come to
nothing are at most `share` of the first attempts plus `reserve_per_s` for each second, and what was saved up in the
last `memory_s` or so. A retry that is answered gives its token back with another on top: each that helped pays for one
that may not. So the budget bounds waste and not recovery: when a mesh comes back, the few tokens there are multiply and
everybody who waits gets through; and while one replica of two hangs, retries that reach the other pay for the rest.

Share and reserve are Finagle's idea (20 % and 10 a second, remembered for 10 s); giving back on success is what the
AWS SDKs' standard mode does. Our figures are smaller because we promise at most 1.1 attempts a call at a mesh that
fails every call: 5 % and 0.5 a second keep that from 20 calls a second on. What was saved leaks away instead of
expiring with a window, since a window that was spent at once leaves nothing at all for the rest of it: callers then
stood still for 7 s beside a mesh that was back.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BaseModel, Field

from loanmesh.runtime.clock import Clock

BONUS = 1.0
"""What an answered retry earns besides its token. With 0, 1,200 callers queued for one token for 12 s after an outage;
with 0.25, callers failed beside a replica of two that hung."""


class BudgetSettings(BaseModel, frozen=True, extra="forbid"):
    """How much may be repeated."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Retries for each first attempt."""
    reserve_per_s: Annotated[float, Field(gt=0)] = 0.5
    """Retries a second besides, so that a caller of few calls can repeat them at all."""
    memory_s: Annotated[float, Field(gt=0)] = 5.0
    """How long what is not spent stays, seconds (to 37 %). Longer lets more be spent at once when a replica dies."""


class Token:
    """Leave to repeat one call."""

    __slots__ = ("_budget",)

    def __init__(self, budget: RetryBudget) -> None:
        self._budget: RetryBudget | None = budget

    def give_back(self) -> None:
        """The retry was answered: it was no waste. A second giving back changes nothing."""
        if budget := self._end():
            budget._earn(1 + BONUS)

    def not_used(self) -> None:
        """The retry was not made after all."""
        if budget := self._end():
            budget._earn(1)

    def _end(self) -> RetryBudget | None:
        budget, self._budget = self._budget, None
        return budget


class RetryBudget:
    """One client's budget. Not for several threads: it lives on one event loop."""

    def __init__(self, settings: BudgetSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        # What the reserve comes to by itself, when its inflow and the leak are equal.
        self._rest = settings.reserve_per_s * settings.memory_s
        self._balance = self._rest
        self._at = clock.monotonic()

    @property
    def balance(self) -> float:
        """Retries that may be made now, a fraction of one included."""
        now = self._clock.monotonic()
        kept = math.exp(-(now - self._at) / self._settings.memory_s)
        self._balance, self._at = self._rest + (self._balance - self._rest) * kept, now
        return self._balance

    def first_attempt(self) -> None:
        """A call is made for the first time; it pays for a part of a retry."""
        self._earn(self._settings.share)

    def try_take(self) -> Token | None:
        """Leave for one retry now; None: wait, and ask again."""
        if self.balance < 1:
            return None
        self._earn(-1)
        return Token(self)

    def _earn(self, amount: float) -> None:
        self._balance = self.balance + amount
