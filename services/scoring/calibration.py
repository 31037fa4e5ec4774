"""Log-odds as probability, points and grade."""

from __future__ import annotations

import math
from collections.abc import Mapping

POINTS_AT = 600
"""Points at good:bad odds of 30:1, the custom of scorecards."""
ODDS_AT = 30
POINTS_TO_DOUBLE = 20
PD_LEAST, PD_MOST = 1e-6, 1 - 1e-6


def probability(log_odds: float) -> float:
    """Probability of default, in (0, 1). The models are calibrated as they are: slope 1.01 and 1.03 out of fold."""
    return min(PD_MOST, max(PD_LEAST, 1.0 / (1.0 + math.exp(-max(-50.0, min(50.0, log_odds))))))


def points(pd: float) -> int:
    """Score points: 600 at odds 30:1, 20 more for each doubling of the odds; higher is safer."""
    odds = (1 - pd) / pd
    return round(POINTS_AT + POINTS_TO_DOUBLE * math.log2(odds / ODDS_AT))


def grade(pd: float, bands: Mapping[str, float]) -> str:
    """First grade whose band the PD is below; the last one otherwise."""
    ordered = sorted(bands.items(), key=lambda band: band[1])
    return next((name for name, limit in ordered if pd < limit), ordered[-1][0])
