"""What a refusal asks of its whole class of urgency. Pure."""

from __future__ import annotations

from loanmesh.runtime.clock import Clock

SHUT_S, SHUT_S_LEAST, SHUT_S_MAX = 0.2, 0.05, 2.0
"""For how long a class stays away where the other side does not say; the shortest and the longest time in any case."""
KNOCK_S = 0.5
"""How long a class that knocks waits for what becomes of it, before it knocks once more."""
WELCOME_S = 2.0
"""For how long a class that had to stay away comes one by one when it is let in again: in company at once, it made
those in a hurry wait twice as long."""

YIELDS_S = 10.0
"""For how long a class comes one by one after it was turned away for the sake of those in more of a hurry: they wait
behind whatever is let in, and many at once are a wave. On a slow machine their p99 was 286 to 469 ms with company and
216 to 334 without, and the others got in no less."""


class Gates:
    """Which classes of urgency the other side lets in.

    A class that is turned away twice in a row, with no answer between, stays away for as long as it was asked to, and
    then knocks with one call until one is answered. Else each call of thousands would be sent to be told the same, and
    those that are let in would queue behind them. Twice, since one of several replicas may be full alone. Where a class
    is shut, so are those that are less urgent; where one is let in, so are those that are more urgent. Who had to stay
    away is not welcome in company for a while, and for longer where it was for those in more of a hurry.
    """

    def __init__(self, classes: int, clock: Clock) -> None:
        self._clock = clock
        self._refusals = [0] * classes
        self._shut_until = [float("-inf")] * classes
        self._knocks_until = [float("-inf")] * classes
        self._changed_at = [float("-inf")] * classes
        self._away_at = [float("-inf")] * classes
        """When the class was last sent away, or let in again."""
        self._yields_until = [float("-inf")] * classes

    def refused(self, urgency: int, sent_at: float, away_s: float | None, *, yields: bool = False) -> None:
        """A call was turned away.

        away_s  for how long the other side wants no such call; None: it did not say. Of a long time, or of none, no
                more is taken than makes sense for a whole class: who was refused may wait for longer by itself.
        yields  whether for the sake of those who are in more of a hurry.
        """
        now = self._clock.monotonic()
        if sent_at < self._changed_at[urgency]:
            return  # It was on its way before: says nothing new.
        self._refusals[urgency] += 1
        self._changed_at[urgency] = now
        self._knocks_until[urgency] = float("-inf")
        if (again := self._refusals[urgency] - 2) < 0:
            return
        asked_s = SHUT_S if away_s is None or away_s < 0 else min(max(away_s, SHUT_S_LEAST), SHUT_S_MAX)
        until = now + min(SHUT_S_MAX, asked_s * 2.0 ** min(again, 10))
        self._shut_until[urgency] = until
        self._away_at[urgency:] = [now] * (len(self._away_at) - urgency)
        if yields:
            self._yields_until[urgency:] = [now + YIELDS_S] * (len(self._yields_until) - urgency)
        for lower in range(urgency + 1, len(self._refusals)):
            if self._refusals[lower] < 2:  # One that is shut already knocks for itself.
                self._refusals[lower], self._shut_until[lower], self._changed_at[lower] = 2, until, now

    def answered(self, urgency: int) -> None:
        """A call was let in."""
        for upper in range(urgency + 1):
            if self._refusals[upper]:
                if self._refusals[upper] >= 2:
                    self._away_at[upper] = self._clock.monotonic()
                self._refusals[upper] = 0
                self._shut_until[upper] = self._knocks_until[upper] = float("-inf")
                self._changed_at[upper] = self._clock.monotonic()

    def sent(self, urgency: int) -> None:
        """A call of the class is sent. Where it knocks, the next one may not for a while: it may hang."""
        if self._refusals[urgency] >= 2:
            self._knocks_until[urgency] = self._clock.monotonic() + KNOCK_S

    def unheard(self, urgency: int) -> None:
        """A call of the class ended, and whether it would have been let in nobody knows."""
        self._knocks_until[urgency] = float("-inf")

    def welcome(self, urgency: int) -> bool:
        """Whether the class was let in all the time of late: neither away, nor let in again a moment ago, nor turned
        away for others."""
        now = self._clock.monotonic()
        long_let_in = self._refusals[urgency] < 2 and now - self._away_at[urgency] >= WELCOME_S
        return long_let_in and now >= self._yields_until[urgency]

    def shut_s(self, urgency: int) -> float:
        """For how long the class is to stay away, seconds."""
        return max(0.0, self._shut_until[urgency] - self._clock.monotonic())

    def opens_s(self, urgency: int) -> float:
        """When the next call of the class may be sent if nothing is heard before, seconds from now."""
        until = max(self._shut_until[urgency], self._knocks_until[urgency])
        return max(0.0, until - self._clock.monotonic())
