"""Deadlines: how much time a call has left, carried from the server's handler to the calls it makes.

grpc.aio does not pass deadlines on (measured); so the server's interceptor notes the deadline here and the client's
interceptor uses what is left, less a reserve for the answer's way back.
"""

from __future__ import annotations

from contextvars import ContextVar

RESERVE_S = 0.02
"""Kept back at each hop for the answer's way. Above 11 ms, by which gRPC rounds deadlines of seconds up on the wire."""
_ends_at: ContextVar[float | None] = ContextVar("deadline_ends_at", default=None)


def note(ends_at: float | None) -> None:
    """Remember when the current call must be answered, in the clock's monotonic seconds; None: no deadline."""
    _ends_at.set(ends_at)


def remaining_s(now: float, at_most_s: float) -> float:
    """Seconds for a call made now: what is left less the reserve, at most `at_most_s`, never below zero."""
    ends_at = _ends_at.get()
    return at_most_s if ends_at is None else max(0.0, min(at_most_s, ends_at - now - RESERVE_S))
