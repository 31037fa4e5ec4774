"""How long a request waited before its handler began: what gRPC hides. Pure.

grpc.aio takes calls in one by one while the loop is free; the others queue where no handler can see them (measured: an
overloaded server falls to a third of its goodput with short queues of its own). So callers say when they sent, by a
clock that never jumps, and the least difference to ours stands for a way without a queue; what exceeds it is queue.
The clocks need not agree, only run at the same speed.
"""

from __future__ import annotations

from collections import OrderedDict

SENDERS_MAX = 10_000
"""Senders remembered; the one not heard of for the longest is forgotten, and starts anew."""
FORGET_S = 60.0
"""How long a least difference counts, and once more as long: clocks drift apart."""
PRESSED_S = 0.05
"""From this queue on, storing comes before deciding."""
PRESSURE_LASTS_S = 0.25


class Arrivals:
    """Delays of arriving requests, in seconds."""

    def __init__(self) -> None:
        # By sender: least difference in this window and in the one before, and when this one began.
        self._least: OrderedDict[str, tuple[float, float, float]] = OrderedDict()
        self._pressed_until = float("-inf")

    def delay_s(self, sender: str, sent_at: float, now: float) -> float:
        """How long a request queued before its handler began.

        sender   names the clock that `sent_at` was read from.
        sent_at, now  monotonic seconds, of the sender's clock and of ours.
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
        if delay_s > PRESSED_S:
            self._pressed_until = now + PRESSURE_LASTS_S
        return delay_s

    def pressed(self, now: float) -> bool:
        """Whether requests have queued lately."""
        return now < self._pressed_until


def read_sent(said: str) -> tuple[str, float] | None:
    """(sender, seconds) of `sender:milliseconds`; None for anything else."""
    sender, _, ms = said[:80].partition(":")
    return (sender, int(ms) / 1000) if sender and ms.isascii() and ms.isdecimal() and len(ms) < 16 else None
