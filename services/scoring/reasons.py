"""Why a score is what it is: every feature's exact contribution as a reason, largest first."""

from __future__ import annotations

from collections.abc import Sequence

from lending.type.v1.reason_pb2 import Fact, Reason

from services.scoring.scorecard import Floats

COUNTS_FROM = 0.05
"""Contributions smaller than this many log-odds (about 5 % of the odds) are added up under SCORE_OTHER."""


def reasons(parts: Floats, facts: Sequence[Fact]) -> list[Reason]:
    """One reason a feature that counted, and one for the rest; together they add up to all contributions.

    parts  shape (features,), log-odds against the average of the training data.
    """
    order = sorted(range(len(facts)), key=lambda i: -abs(parts[i]))
    said = [
        _reason(_code(facts[i].attribute), float(parts[i]), [facts[i]]) for i in order if abs(parts[i]) >= COUNTS_FROM
    ]
    rest = float(sum(parts[i] for i in order if abs(parts[i]) < COUNTS_FROM))
    return [*said, _reason("SCORE_OTHER", rest, [])] if len(said) < len(order) else said


def _reason(code: str, contribution: float, facts: Sequence[Fact]) -> Reason:
    effect = Reason.EFFECT_ADVERSE if contribution > 0 else Reason.EFFECT_FAVOURABLE
    return Reason(code=code, kind=Reason.KIND_SCORE_FACTOR, effect=effect, facts=facts, contribution=contribution)


def _code(attribute: str) -> str:
    return "SCORE_" + attribute.split(".", 1)[-1].upper()
