"""How long an answer counts: fresh, a decline may rest on it; usable, an approval may; after that nothing. Pure.

Times are seconds since 1970. Age counts from when the answer was true at the source, not from when we asked.
"""

from __future__ import annotations

from services.bureau.sources import Source


def fresh_until(observed_at: float, source: Source) -> float:
    """When it stops being fresh."""
    return observed_at + source.fresh_for_s


def is_fresh(observed_at: float, source: Source, now_s: float) -> bool:
    """Whether a decline may still rest on it."""
    return now_s < fresh_until(observed_at, source)


def is_usable(observed_at: float, source: Source, now_s: float) -> bool:
    """Whether an approval may still rest on it."""
    return now_s < observed_at + source.usable_for_s
