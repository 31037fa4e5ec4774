"""From a profile to the model's features: what each source said, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from lending.bureau.v1.bureau_service_pb2 import Attribute, CreditProfile, SourceReport
from lending.type.v1.reason_pb2 import Fact, Value

from loanmesh.runtime.errors import MissingEvidence
from services.scoring.model import Model
from services.scoring.scorecard import Floats

# Not known at the source is an answer (a thin file); not answered is none.
_ANSWERED = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_STALE, SourceReport.STATE_NOT_FOUND})


@dataclass(frozen=True)
class Features:
    """A profile as the model sees it."""

    values: Floats
    """Shape (features,); NaN where unknown."""
    facts: list[Fact]
    """The same as facts with their source, for reasons."""


def features(model: Model, profile: CreditProfile) -> Features:
    """Raises MissingEvidence naming the required sources that gave no answer."""
    answered = {report.source: report for report in profile.reports if report.state in _ANSWERED}
    if missing := sorted(model.required_sources - answered.keys()):
        raise MissingEvidence(missing)
    wanted = frozenset(model.features)
    said = {
        name: (attribute, report)
        for report in answered.values()
        for attribute in report.attributes
        if (name := attribute.name) in wanted
    }
    values = np.full(len(model.terms), math.nan)
    facts = []
    for column, name in enumerate(model.features):
        if name not in said:
            facts.append(Fact(attribute=name, value=Value(), source=_source_of(model)))
            continue
        attribute, report = said[name]
        values[column] = _number(attribute)
        facts.append(
            Fact(attribute=name, value=attribute.value, source=report.source, observed_time=report.observed_time)
        )
    return Features(values, facts)


def _number(attribute: Attribute) -> float:
    match attribute.value.WhichOneof("kind"):
        case "integer":
            return float(attribute.value.integer)
        case "number":
            return attribute.value.number
        case "flag":
            return float(attribute.value.flag)
        case _:
            return math.nan


def _source_of(model: Model) -> str:
    return min(model.required_sources)
