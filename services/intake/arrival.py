"""How long a request waited before its handler began: what gRPC hides. Pure.

grpc.aio takes calls in one by one while the loop is free; the others queue where no handler can see them (measured: an
overloaded server falls to a third of its goodput with short queues of its own). So callers say when they sent, by a
clock that never jumps, and the least difference to ours stands for a way without a queue; what exceeds it is queue.
The clocks need not agree, only run at the same speed.

Callers hold calls back themselves where they are slowed down. They say for how long, since that is a queue before our
door as well: one that no clock of ours would show.
"""

from __future__ import annotations

from collections import OrderedDict

SENDERS_MAX = 10_000
"""Senders remembered; the one not heard of for the longest is forgotten, and starts anew."""
FORGET_S = 60.0
"""How long a least difference counts, and once more as long: clocks drift apart."""
ASSUMED_S = 5.0
"""How long it is assumed of a new sender that its first call waited as long as others did: then its own word counts."""
STANDING_S = 0.05
"""From this queue on, storing comes before deciding: where even the quickest of an interval had to wait for so long."""
INTERVAL_S = 0.2
"""As CoDel (RFC 8289) tells a standing queue from a burst: by the least delay of an interval, not by the longest.
Callers who come back together, as after each batch of decisions, make a burst."""


HELD_S = 0.1
"""From this mean on of how long callers held their calls back, storing comes before deciding, too."""
HELD_S_MAX = 1.0
"""What counts of one call's word: a caller that makes it up must not outweigh all others."""
USUAL_WEIGHT = 0.1
"""Weight of the newest call in the mean of how long calls queue."""
HELD_WEIGHT = 0.05
"""Weight of the newest call in that mean."""


class _Sender:
    """What is known of one sender's clock: differences of ours and its, seconds."""

    __slots__ = ("assumed", "assumed_until", "before", "began", "least")

    def __init__(self, way_s: float, standing_s: float, now: float) -> None:
        self.least = self.before = way_s
        """The least of this window, and of the one before."""
        self.began = now
        self.assumed, self.assumed_until = way_s - standing_s, now + ASSUMED_S

    def seen(self, way_s: float, now: float) -> None:
        """A request took so long, difference of clocks included."""
        if now - self.began > FORGET_S:
            self.least, self.before, self.began = way_s, self.least, now
        self.least = min(self.least, way_s)


class Arrivals:
    """Delays of arriving requests, in seconds."""

    def __init__(self) -> None:
        self._senders: OrderedDict[str, _Sender] = OrderedDict()
        self._began = float("-inf")
        self._least_delay_s = self._stood_s = 0.0
        self._usual_s = 0.0
        self._held_s = 0.0
        self._held_at = float("-inf")

    def delay_s(self, sender: str, sent_at: float, now: float) -> float:
        """How long a request queued before its handler began.

        sender   names the clock that `sent_at` was read from.
        sent_at, now  monotonic seconds, of the sender's clock and of ours.
        """
        way_s = now - sent_at
        # Whoever comes first while a queue stands has waited in it as well, though nobody knows its clock yet.
        known = self._senders.pop(sender, None) or _Sender(way_s, self._standing_s(now), now)
        known.seen(way_s, now)
        self._senders[sender] = known
        if len(self._senders) > SENDERS_MAX:
            self._senders.popitem(last=False)
        least = min(known.least, known.before)
        # What is assumed is no evidence for the next assumption: without a queue it would go on for ever.
        self._note(way_s - least, now)
        return way_s - (min(least, known.assumed) if now < known.assumed_until else least)

    def usual_s(self, now: float) -> float:
        """How long requests queue in the mean of late, seconds: no single caller's way, clock or word decides it."""
        return self._usual_s if now < self._began + 2 * INTERVAL_S else 0.0

    def held_back(self, seconds: float, now: float) -> None:
        """A caller held a call back for so long before it was sent."""
        if now > self._held_at + 2 * INTERVAL_S:
            self._held_s = 0.0  # What was so long ago says nothing of now.
        self._held_s += (min(seconds, HELD_S_MAX) - self._held_s) * HELD_WEIGHT
        self._held_at = now

    def pressed(self, now: float) -> bool:
        """Whether a queue stands before the door, or at the callers'."""
        standing = self._standing_s(now) > STANDING_S
        return standing or (self._held_s > HELD_S and now < self._held_at + 2 * INTERVAL_S)

    def _standing_s(self, now: float) -> float:
        """What even the quickest of the last interval had to wait, seconds; 0 where that is too long ago."""
        return self._stood_s if now < self._began + 2 * INTERVAL_S else 0.0

    def _note(self, delay_s: float, now: float) -> None:
        if now >= self._began + 2 * INTERVAL_S:
            self._usual_s = 0.0
        self._usual_s += (min(delay_s, HELD_S_MAX) - self._usual_s) * USUAL_WEIGHT
        if now < self._began + INTERVAL_S:
            self._least_delay_s = min(self._least_delay_s, delay_s)
            return
        # An interval in which hardly anybody came says nothing of the next.
        self._stood_s = self._least_delay_s if now < self._began + 2 * INTERVAL_S else 0.0
        self._began, self._least_delay_s = now, delay_s


def read_sent(said: str) -> tuple[str, float, float] | None:
    """(sender, sent at, held back for), seconds, of `sender:milliseconds[:milliseconds]`; None for anything else."""
    sender, *numbers = said[:80].split(":")
    if not sender or len(numbers) not in (1, 2):
        return None
    if not all(ms.isascii() and ms.isdecimal() and len(ms) < 16 for ms in numbers):
        return None
    sent_s, held_s = (int(ms) / 1000 for ms in (*numbers, "0")[:2])
    return sender, sent_s, held_s
