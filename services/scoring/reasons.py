"""Why a score is what it is: every feature's exact contribution as a reason, largest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.reason_pb2 import Fact, Reason

COUNTS_FROM = 0.05
"""Contributions smaller than this many log-odds (about 5 % of the odds) are added up under SCORE_OTHER."""


def add_reasons(
    score: Score, parts: Sequence[float], names: Sequence[str], state: Callable[[int, Fact], object]
) -> None:
    """One reason a feature that counted, and one for the rest; together they add up to all contributions.

    parts  one a feature, log-odds against the average of the training data.
    state  fills in a fact with a feature, by its place; asked only for those that counted.
    """
    order = sorted(range(len(parts)), key=lambda i: -abs(parts[i]))
    counted = 0
    for i in order:
        if abs(parts[i]) >= COUNTS_FROM:
            # In place: a message given to another's constructor is written and read once more.
            state(i, _add(score, _code(names[i]), parts[i]).facts.add())
            counted += 1
    if counted < len(order):
        _add(score, "SCORE_OTHER", sum([parts[i] for i in order[counted:]]))


def _add(score: Score, code: str, contribution: float) -> Reason:
    effect = Reason.EFFECT_ADVERSE if contribution > 0 else Reason.EFFECT_FAVOURABLE
    return score.factors.add(code=code, kind=Reason.KIND_SCORE_FACTOR, effect=effect, contribution=contribution)


@cache  # There are as many as models have features.
def _code(attribute: str) -> str:
    return "SCORE_" + attribute.split(".", 1)[-1].upper()
