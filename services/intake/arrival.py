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
STANDING_S = 0.05
"""From this queue on, deciding rests for storing: where even the quickest of an interval had to wait for so long."""
INTERVAL_S = 0.2
"""As CoDel (RFC 8289) tells a standing queue from a burst: by the least delay of an interval, not by the longest.
Callers who come back together, as after each batch of decisions, make a burst."""


HELD_S = 0.1
"""From this mean on of how long callers held their calls back, storing comes before deciding, too."""
HELD_S_MAX = 1.0
"""What counts of one call's word: a caller that makes it up must not outweigh all others."""
USUAL_WEIGHT, USUAL_S_MAX = 0.1, 0.1
"""Weight of the newest call in the mean of how long calls queue, and the most that it counts for, seconds: a caller
whose clock stood still must not make a queue where there is none."""
HELD_WEIGHT = 0.05
"""Weight of the newest call in that mean."""


class Arrivals:
    """Delays of arriving requests, in seconds."""

    def __init__(self) -> None:
        # By sender: least difference in this window and in the one before, and when this one began.
        self._least: OrderedDict[str, tuple[float, float, float]] = OrderedDict()
        self._began = float("-inf")
        self._least_delay_s = self._usual_s = 0.0
        self._standing = False
        self._held_s = 0.0
        self._held_at = float("-inf")

    def delay_s(self, sender: str, sent_at: float, now: float, *, usual: bool = True) -> float:
        """How long a request queued before its handler began.

        sender   names the clock that `sent_at` was read from.
        sent_at, now  monotonic seconds, of the sender's clock and of ours.
        usual    whether it is one like most, which counts in the mean.
        """
        way_s = now - sent_at
        current, before, began = self._least.pop(sender, (way_s, way_s, now))
        if now - began > FORGET_S:
            current, before, began = way_s, current, now
        current = min(current, way_s)
        self._least[sender] = (current, before, began)
        if len(self._least) > SENDERS_MAX:
            self._least.popitem(last=False)
        delay_s = way_s - min(current, before)
        self._note(delay_s, now)
        if usual:
            self._usual_s += (min(delay_s, USUAL_S_MAX) - self._usual_s) * USUAL_WEIGHT
        return delay_s

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
        standing = self._standing and now < self._began + 2 * INTERVAL_S
        return standing or (self._held_s > HELD_S and now < self._held_at + 2 * INTERVAL_S)

    def _note(self, delay_s: float, now: float) -> None:
        if now < self._began + INTERVAL_S:
            self._least_delay_s = min(self._least_delay_s, delay_s)
            return
        # An interval in which hardly anybody came says nothing of the next.
        goes_on = now < self._began + 2 * INTERVAL_S
        self._standing = goes_on and self._least_delay_s > STANDING_S
        self._usual_s = self._usual_s if goes_on else 0.0
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
