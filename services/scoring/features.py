"""From a profile to the model's features: what each source said, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lending.bureau.v1.bureau_service_pb2 import Attribute, CreditProfile, SourceReport
from lending.type.v1.reason_pb2 import Fact, Value

from loanmesh.runtime.errors import MissingEvidence
from services.scoring.model import Model

# Not known at the source is an answer (a thin file); not answered is none.
_ANSWERED = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_STALE, SourceReport.STATE_NOT_FOUND})

_NUMBERS = frozenset({"integer", "number", "flag"})


@dataclass(frozen=True)
class Features:
    """A profile as the model sees it."""

    model: Model
    values: list[float]
    """One a feature, in the model's order; NaN where unknown."""
    said: Mapping[int, tuple[Attribute, SourceReport]]
    """By feature: where it stands in the profile."""

    def state(self, column: int, fact: Fact) -> None:
        """Fill in a fact with a feature and its source, for a reason that shows it."""
        fact.attribute = self.model.features[column]
        if column not in self.said:
            fact.value.SetInParent()
            fact.source = min(self.model.required_sources)
            return
        attribute, report = self.said[column]
        fact.source = report.source
        fact.value.CopyFrom(attribute.value)
        fact.observed_time.CopyFrom(report.observed_time)


def features(model: Model, profile: CreditProfile) -> Features:
    """Raises MissingEvidence naming the required sources that gave no answer."""
    answered = {report.source: report for report in profile.reports if report.state in _ANSWERED}
    if missing := model.required_sources - answered.keys():
        raise MissingEvidence(sorted(missing))
    values = [math.nan] * len(model.terms)
    said: dict[int, tuple[Attribute, SourceReport]] = {}
    for report in answered.values():
        for attribute in report.attributes:
            column = model.columns.get(attribute.name)
            if column is not None:
                values[column] = _number(attribute.value)
                said[column] = (attribute, report)
    return Features(model, values, said)


def _number(value: Value) -> float:
    kind = value.WhichOneof("kind")
    return float(getattr(value, kind)) if kind in _NUMBERS else math.nan
