"""How many applications come when, and how fast they must be decided to be decided in time. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from loanmesh.promotion.file import Promotion
from loanmesh.promotion.waiting import PRIORITIES, Waiting, percentiles

SLICES = 4000
"""Into how many pieces a promotion is cut to look at its backlog."""
AFTER_S_MAX = 24 * 3600.0
"""How long after the end a backlog is followed, seconds."""
AFTER_SLICE_S = 0.5
"""Pieces of the time after the end are at least so long: a day of the pieces of a short promotion would be too many."""
PRECISION = 2e-3
"""How near a rate is found, as a share of it."""
Rate = Callable[[float], float]
"""Applications a second at so many seconds after the start."""


def arrivals(promotion: Promotion, scale: float = 1.0, channel: str | None = None) -> Rate:
    """The usual before the start; the height; a straight line down to the usual at the end.

    scale    multiplies everything, the usual too.
    channel  only of this one; None: of all.
    """
    chosen = [one for name, one in promotion.channels.items() if channel in (None, name)]
    usual = scale * sum(one.usual_a_second for one in chosen)
    peak = scale * sum(one.peak_a_second for one in chosen)
    height_s, length_s = promotion.height_s, promotion.length_s

    def rate(at_s: float) -> float:
        if not 0 <= at_s < length_s:
            return usual
        if at_s < height_s:
            return peak
        return peak + (usual - peak) * (at_s - height_s) / (length_s - height_s)

    return rate


def asked_shares(promotion: Promotion) -> dict[str, float]:
    """Queries to each limited source for each application at the height."""
    peaks = {name: one.peak_a_second for name, one in promotion.channels.items()}
    whole = sum(peaks.values())
    return {
        source: promotion.new_subjects
        * sum(
            peaks[name] / whole * sum(one.kinds.get(kind, 0.0) for kind in set(quota.asked_for))
            for name, one in promotion.channels.items()
        )
        for source, quota in promotion.sources.items()
    }


def source_bounds(promotion: Promotion, quotas: Mapping[str, float] | None = None) -> dict[str, float]:
    """Applications a second that each limited source lets be decided; those never asked are left out.

    quotas  queries a second instead of what the file says, by source.
    """
    granted = {name: quota.a_second for name, quota in promotion.sources.items()} | dict(quotas or {})
    return {name: granted[name] / share for name, share in asked_shares(promotion).items() if share > 0}


def wait_s(promotion: Promotion, scale: float, decides_a_second: float, longest_s: float = math.inf) -> float:
    """Within which time 99 of 100 are decided at a steady rate of deciding, seconds; infinite where a backlog is left a
    day after the end.

    Of those that come from start to end. Urgent classes go first, so that it is the others that wait.

    longest_s  what is longer than this need not be known: infinite then, as soon as that is clear.
    """
    length_s = promotion.length_s
    slice_s = length_s / SLICES
    rates = [
        (PRIORITIES.index(channel.priority), arrivals(promotion, scale, name))
        for name, channel in promotion.channels.items()
    ]
    waiting = Waiting()
    waits: list[tuple[float, float]] = []
    starts_s = came = late = 0.0
    while starts_s < length_s + AFTER_S_MAX:
        at_s = starts_s + slice_s / 2
        for priority, rate in rates:
            waiting.add(priority, at_s, rate(at_s) * slice_s)
            came += rate(at_s) * slice_s if at_s < length_s else 0.0
        taken = waiting.take(decides_a_second * slice_s)
        waits += [(at_s - came_at, count) for came_at, count in taken if came_at < length_s]
        late += sum(count for came_at, count in taken if came_at < length_s and at_s - came_at > longest_s)
        starts_s += slice_s
        if starts_s >= length_s:
            if late > 0.01 * came:
                return math.inf
            if waiting.oldest_at_s(starts_s) >= length_s:
                return percentiles(waits)["p99"]
            slice_s = max(slice_s, AFTER_SLICE_S)
    return math.inf


def rate_needed(promotion: Promotion, scale: float, within_s: float) -> float:
    """The least steady rate of deciding at which 99 of 100 are decided within so long, applications a second."""
    came = arrivals(promotion, scale)
    slice_s = promotion.length_s / SLICES
    slices = [came((number + 0.5) * slice_s) for number in range(SLICES)]
    # Nobody waits at the height of arrivals. Below the least at which, first come first decided, the backlog is never
    # longer than what is decided in time, many wait longer, whoever goes first.
    low, high = 0.0, max(slices)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _longest_backlog(slices, slice_s, middle) <= within_s * middle else (middle, high)
    low, high = low / 2, max(slices)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if wait_s(promotion, scale, middle, within_s) <= within_s else (middle, high)
    return high


def _longest_backlog(slices: Sequence[float], slice_s: float, decides_a_second: float) -> float:
    backlog = longest = 0.0
    for came_a_second in slices:
        backlog = max(0.0, backlog + (came_a_second - decides_a_second) * slice_s)
        longest = max(longest, backlog)
    return longest
