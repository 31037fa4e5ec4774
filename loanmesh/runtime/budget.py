"""A retry budget: how many repeated calls a client may add to those it makes anyway. Pure, with the clock passed in.

Without one, n attempts a call make n times the load just when the mesh can bear it least. In any `ttl_s`, retries that
come to nothing are at most `share` of the first attempts plus `reserve_per_s` for each second. A retry that is
answered gives its token back, so that the budget bounds waste and not recovery: when a mesh comes back, everybody who
waits gets through on the few tokens there are.

The window, the share and the reserve are Finagle's idea (10 s, 20 %, 10 a second); giving back on success is what the
AWS SDKs' standard mode does. Our figures are smaller because we promise at most 1.1 attempts a call at a mesh that
fails every call: 5 % and 0.5 a second keep that from 10 calls a second on.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated

from pydantic import BaseModel, Field

from loanmesh.runtime.clock import Clock

SLOTS = 10
"""Parts of the window that are forgotten one by one."""


class BudgetSettings(BaseModel, frozen=True, extra="forbid"):
    """How much may be repeated."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Retries for each first attempt of the window."""
    reserve_per_s: Annotated[float, Field(ge=0)] = 0.5
    """Retries a second besides, so that a caller of few calls can repeat them at all."""
    ttl_s: Annotated[float, Field(gt=0)] = 10.0
    """The window, seconds. Longer lets a larger part of it be spent at once."""


class _Slot:
    __slots__ = ("began_at", "first", "taken")

    def __init__(self, began_at: float) -> None:
        self.began_at = began_at
        self.first = 0
        self.taken = 0


class Token:
    """Leave to repeat one call."""

    __slots__ = ("_slot",)

    def __init__(self, slot: _Slot) -> None:
        self._slot: _Slot | None = slot

    def give_back(self) -> None:
        """The retry was answered: it was no waste. A second giving back changes nothing."""
        slot, self._slot = self._slot, None
        if slot:
            slot.taken -= 1


class RetryBudget:
    """One client's budget. Not for several threads: it lives on one event loop."""

    def __init__(self, settings: BudgetSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._slots: deque[_Slot] = deque()

    def first_attempt(self) -> None:
        """A call is made for the first time; it pays for a part of a retry."""
        self._slot().first += 1

    def try_take(self) -> Token | None:
        """Leave for one retry now; None: wait, and ask again."""
        slot = self._slot()
        if self.balance < 1:
            return None
        slot.taken += 1
        return Token(slot)

    @property
    def balance(self) -> float:
        """Retries that may be made now, a fraction of one included."""
        self._slot()
        earned = sum(slot.first for slot in self._slots) * self._settings.share
        reserve = self._settings.reserve_per_s * self._settings.ttl_s
        return earned + reserve - sum(slot.taken for slot in self._slots)

    def _slot(self) -> _Slot:
        """The slot of now, after forgetting those that left the window."""
        now = self._clock.monotonic()
        while self._slots and now - self._slots[0].began_at >= self._settings.ttl_s:
            self._slots.popleft()
        if not self._slots or now - self._slots[-1].began_at >= self._settings.ttl_s / SLOTS:
            self._slots.append(_Slot(now))
        return self._slots[-1]
