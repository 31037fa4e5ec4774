"""Our own clock with a witness beside it: the database's, by which leases go already, and which all replicas share.

A replica whose time of day is wrong would refuse sound consents as given in the future, or offer what is over at once.
So the time of day is compared with the witness's, and where the two differ by more than a bound, the witness is
believed: its last word, carried on by our monotonic clock, which never jumps.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Awaitable, Callable

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.degradation import Load, Step, StepSettings
from loanmesh.runtime.errors import NotNow

BOUND_S = 2.0
"""How far our clock may be off before it is not believed. Synchronised ones differ by milliseconds, and an answer of
the witness that took long tells the time only so exactly."""
ASK_EVERY_S = 5.0
STEP = "clock_not_believed"


class WitnessedClock:
    """A Clock: the process's own, or the witness's where ours is known to be off.

    ask  the witness's time, seconds since 1970. May raise NotNow: then its last word stands.
    """

    def __init__(self, own: Clock, ask: Callable[[], Awaitable[float]], told: Callable[[float], None]) -> None:
        """told  called with how many seconds our clock is ahead, when we cease to believe it."""
        self._own = own
        self.monotonic = own.monotonic
        """Seconds that never go back: our own, asked for a dozen times an application."""
        self._ask = ask
        self._told = told
        self._earliest_s = self._latest_s = float("nan")
        self._was_off = False
        rule = StepSettings(enter_at=1.0, leave_below=1.0, calm_s=0.0)
        self.step = Step(STEP, "time_of_day", rule, self._load, own)
        """In force while our clock is not believed; shown among the process's degradations."""

    @property
    def is_sure(self) -> bool:
        """Whether the witness was heard since the start."""
        return self._earliest_s == self._earliest_s

    @property
    def ahead_s(self) -> float:
        """How far our time of day is ahead of the witness's, seconds, at least; negative: behind. 0: within what the
        witness's answer can tell."""
        own_s, passed_s = self._own.now().timestamp(), self._own.monotonic()
        if own_s > self._latest_s + passed_s:
            return own_s - self._latest_s - passed_s
        if own_s < self._earliest_s + passed_s:
            return own_s - self._earliest_s - passed_s
        return 0.0

    def now(self) -> dt.datetime:
        """The time of day, UTC, aware."""
        own = self._own.now()
        own_s, passed_s = own.timestamp(), self._own.monotonic()
        # False for what nobody has told yet: no comparison is ever true of NaN.
        if own_s > self._latest_s + passed_s + BOUND_S:
            return dt.datetime.fromtimestamp(self._latest_s + passed_s, dt.UTC)
        if own_s < self._earliest_s + passed_s - BOUND_S:
            return dt.datetime.fromtimestamp(self._earliest_s + passed_s, dt.UTC)
        return own

    async def sleep(self, seconds: float) -> None:
        """Let at least `seconds` pass."""
        await self._own.sleep(seconds)

    async def look(self) -> None:
        """Ask the witness once. Raises NotNow."""
        asked_at = self._own.monotonic()
        witness_s = await self._ask()
        # It looked at its clock at some moment between question and answer.
        self._earliest_s, self._latest_s = witness_s - self._own.monotonic(), witness_s - asked_at
        ahead_s = self.ahead_s
        if abs(ahead_s) > BOUND_S and not self._was_off:
            self._told(ahead_s)
        self._was_off = abs(ahead_s) > BOUND_S

    async def look_forever(self) -> None:
        """Ask the witness now and then; ends by cancellation only."""
        while True:
            with contextlib.suppress(NotNow):  # The store itself tells of its trouble; the last word stands.
                await self.look()
            await self._own.sleep(ASK_EVERY_S)

    def _load(self) -> Load:
        ahead_s = self.ahead_s
        way = "ahead of" if ahead_s > 0 else "behind"
        return Load(abs(ahead_s) / BOUND_S, f"our clock is {abs(ahead_s):.1f} s {way} the database's")
