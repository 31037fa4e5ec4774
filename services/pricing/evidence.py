"""What is known of an applicant when policy looks: facts, who said them, and which sources are silent."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.reason_pb2 import Fact, Value

_COMPLETE = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND})
_USABLE = _COMPLETE | {SourceReport.STATE_STALE}


@dataclass(frozen=True)
class Evidence:
    """Facts by name, with their wire form, and the sources by how they answered."""

    values: Mapping[str, Any]
    facts: Mapping[str, Fact]
    complete: frozenset[str]
    """Sources whose answer a decline may rest on."""
    usable: frozenset[str]
    """Sources whose answer an approval may rest on: the complete ones and those with an older answer."""

    def integer(self, name: str) -> int | None:
        """A whole-number fact; None where unknown."""
        value = self.values.get(name)
        return int(value) if value is not None else None


def evidence(item: PriceApplicationsRequest.Item) -> Evidence:
    """All that is known of one application."""
    values: dict[str, Any] = {}
    facts: dict[str, Fact] = {}
    complete, usable = set(), set()
    for report in item.profile.reports:
        if report.state in _COMPLETE:
            complete.add(report.source)
        if report.state not in _USABLE:
            continue
        usable.add(report.source)
        for attribute in report.attributes:
            kind = attribute.value.WhichOneof("kind")
            if kind:
                values[attribute.name] = getattr(attribute.value, kind)
                facts[attribute.name] = Fact(
                    attribute=attribute.name,
                    value=attribute.value,
                    source=report.source,
                    observed_time=report.observed_time,
                )
    purpose = LoanRequest.PurposeKind.Name(item.loan.purpose_kind).removeprefix("PURPOSE_KIND_")
    _say(values, facts, "request.purpose_kind", Value(text=purpose), "declared")
    if item.HasField("age_years"):
        _say(values, facts, "request.age_years", Value(integer=item.age_years), "declared")
    _say(values, facts, "score.pd", Value(number=item.score.pd), "model")
    _say(values, facts, "request.amount_fen", Value(integer=item.loan.amount_fen), "declared")
    _say(values, facts, "request.term_months", Value(integer=item.loan.term_months), "declared")
    if item.declaration.HasField("monthly_income_fen"):
        income = Value(integer=item.declaration.monthly_income_fen)
        _say(values, facts, "declared.monthly_income_fen", income, "declared")
    return Evidence(values, facts, frozenset(complete), frozenset(usable))


def _say(values: dict[str, Any], facts: dict[str, Fact], name: str, value: Value, source: str) -> None:
    values[name] = getattr(value, value.WhichOneof("kind") or "text")
    facts[name] = Fact(attribute=name, value=value, source=source)


def today(now: dt.datetime) -> dt.date:
    """The day whose law applies: China's."""
    return now.astimezone(dt.timezone(dt.timedelta(hours=8))).date()
