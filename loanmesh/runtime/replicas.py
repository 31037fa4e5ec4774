"""How many replicas of a service are wanted, from what waits, what comes in and what one replica does. Pure.

Intake's KEDA scaler and the promotion simulator use the same function, so that what is simulated is what will happen.
"""

from __future__ import annotations

from dataclasses import dataclass

SPEED_LEAST, SPEED_MOST = 0.5, 2.0
"""How far a rate measured now may move the one measured beforehand. Where replicas seem slower than half of what they
are known to do, it is no want of replicas: a source's quota or a dead service bounds them, and more would wait too."""


@dataclass(frozen=True)
class Load:
    """What a service is asked to do."""

    backlog: float
    """Applications that could be worked on now and are not decided."""
    arrivals_a_second: float


def wanted(
    load: Load, a_second: float, drain_s: float, utilisation: float, *, speed: float = 1.0, backlog_counts: bool = True
) -> float:
    """Replicas wanted, not rounded; 0 where there is nothing to do.

    a_second        applications that one replica handles a second when it does nothing else; above 0.
    drain_s         seconds within which the backlog should be gone, while traffic goes on.
    utilisation     share of a replica that traffic alone may use, in (0, 1]: never fewer than that needs.
    speed           what replicas do now over `a_second`; counts within SPEED_LEAST and SPEED_MOST.
    backlog_counts  False for who only accepts: what waits to be decided is not its work.
    """
    rate = a_second * min(SPEED_MOST, max(SPEED_LEAST, speed))
    for_traffic = load.arrivals_a_second / utilisation
    if not backlog_counts:
        return for_traffic / rate
    return max(for_traffic, load.arrivals_a_second + load.backlog / drain_s) / rate
