"""What is distributed and recorded one by one: names, units and the bounds that tell most. Pure."""

from __future__ import annotations

from typing import NamedTuple

from loanmesh.runtime import semconv


class Measure(NamedTuple):
    """A histogram. Bounds are upper bounds, in its unit."""

    name: str
    unit: str
    bounds: tuple[float, ...]


SERVER_CALL = Measure(semconv.SERVER_DURATION, "s", semconv.DURATION_BOUNDS_S)
"""A call from its beginning to its end, as the server sees it."""
CLIENT_CALL = Measure(semconv.CLIENT_DURATION, "s", semconv.DURATION_BOUNDS_S)
"""The same as the caller sees it."""
DECISION = Measure(
    "loanmesh.decision.duration",
    "s",
    # 15 s is what is promised; below it the usual, above it how much later a day of trouble makes it.
    (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30, 60, 120, 300, 900, 3600, 14400),
)
"""From acknowledgement to decision, by priority and outcome; without those that waited for their applicant."""
ACKNOWLEDGEMENT = Measure(
    "loanmesh.acknowledgement.duration",
    "s",
    # 0.25 s is the target at the peak; after 2 s callers count it as lost.
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10),
)
"""From the arrival of a call to its applications being stored, queue before the door included, by priority."""
ESTIMATE = Measure(
    "loanmesh.estimate.quotient",
    "1",
    # Within a quarter of the truth: between 0.75 and 1.25.
    (0.25, 0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10),
)
"""How long a decision took after it was estimated, over the estimate: 1 is exact, 2 is twice as late."""
