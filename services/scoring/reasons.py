"""Why a score is what it is: every feature's exact contribution as a reason, largest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from lending.type.v1.reason_pb2 import Fact, Reason

COUNTS_FROM = 0.05
"""Contributions smaller than this many log-odds (about 5 % of the odds) are added up under SCORE_OTHER."""


def reasons(parts: Sequence[float], names: Sequence[str], fact: Callable[[int], Fact]) -> list[Reason]:
    """One reason a feature that counted, and one for the rest; together they add up to all contributions.

    parts  one a feature, log-odds against the average of the training data.
    fact   a feature as a fact, by its place; asked only for those that counted.
    """
    order = sorted(range(len(parts)), key=lambda i: -abs(parts[i]))
    said = [_reason(_code(names[i]), parts[i], [fact(i)]) for i in order if abs(parts[i]) >= COUNTS_FROM]
    if len(said) == len(order):
        return said
    return [*said, _reason("SCORE_OTHER", sum([parts[i] for i in order[len(said) :]]), [])]


def _reason(code: str, contribution: float, facts: Sequence[Fact]) -> Reason:
    effect = Reason.EFFECT_ADVERSE if contribution > 0 else Reason.EFFECT_FAVOURABLE
    return Reason(code=code, kind=Reason.KIND_SCORE_FACTOR, effect=effect, facts=facts, contribution=contribution)


@cache  # There are as many as models have features.
def _code(attribute: str) -> str:
    return "SCORE_" + attribute.split(".", 1)[-1].upper()
