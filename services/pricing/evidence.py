"""What is known of an applicant when policy looks: facts, who said them, and which sources are silent."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lending.bureau.v1.bureau_service_pb2 import Attribute, SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.reason_pb2 import Fact, Value

_COMPLETE = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND})
_USABLE = _COMPLETE | {SourceReport.STATE_STALE}


@dataclass(frozen=True)
class Evidence:
    """Values by name, where each came from, and the sources by how they answered."""

    values: Mapping[str, Any]
    origins: Mapping[str, tuple[Value, str, Attribute | None, SourceReport | None]]
    """Each value in its wire form, who said it, and where it stands in the profile; nowhere for what is declared."""
    complete: frozenset[str]
    """Sources whose answer a decline may rest on."""
    usable: frozenset[str]
    """Sources whose answer an approval may rest on: the complete ones and those with an older answer."""

    def integer(self, name: str) -> int | None:
        """A whole-number fact; None where unknown."""
        value = self.values.get(name)
        return int(value) if value is not None else None

    def fact(self, name: str) -> Fact:
        """The fact in its wire form, built only for the few that a reason shows; without a value where unknown."""
        if name not in self.origins:
            return Fact(attribute=name)
        value, source, attribute, report = self.origins[name]
        dated = next((said for said in (attribute, report) if said and said.HasField("observed_time")), None)
        return Fact(attribute=name, value=value, source=source, observed_time=dated.observed_time if dated else None)


def evidence(
    item: PriceApplicationsRequest.Item, types: Mapping[str, Mapping[str, str]], now: dt.datetime, term_months: int
) -> Evidence:
    """All that is known of one application, for a loan of that term.

    types  by source: the facts that are its to state, each with its kind of value.
    An answer that states a fact as another kind of value than the dictionary says is no answer: a fault at the
    source must not decide.
    """
    values: dict[str, Any] = {}
    origins: dict[str, tuple[Value, str, Attribute | None, SourceReport | None]] = {}
    complete, usable = set(), set()
    now_s = now.timestamp()
    for report in item.profile.reports:
        source = report.source
        if report.state not in _USABLE or (said := _said(report, types.get(source, {}))) is None:
            continue
        usable.add(source)
        expired = report.HasField("usable_until_time") and report.usable_until_time.seconds <= now_s
        if report.state in _COMPLETE and not expired:
            complete.add(source)
        for name, value, attribute in said:
            values[name] = value
            origins[name] = (attribute.value, source, attribute, report)
    for name, stated, source in _stated(item, term_months):
        values[name] = getattr(stated, stated.WhichOneof("kind") or "text")
        origins[name] = (stated, source, None, None)
    return Evidence(values, origins, frozenset(complete), frozenset(usable))


def _said(report: SourceReport, types: Mapping[str, str]) -> list[tuple[str, Any, Attribute]] | None:
    """The facts of one report that are its source's to state; None when one has the wrong kind."""
    said: list[tuple[str, Any, Attribute]] = []
    for attribute in report.attributes:
        name, stated = attribute.name, attribute.value
        type_, kind = types.get(name), stated.WhichOneof("kind")
        if type_ is None or kind is None:
            continue
        value = getattr(stated, kind)
        if type_ == "number" and kind == "integer":
            value = float(value)
        elif kind != type_ or value != value:  # NaN alone differs from itself.
            return None
        said.append((name, value, attribute))
    return said


def _stated(item: PriceApplicationsRequest.Item, term_months: int) -> list[tuple[str, Value, str]]:
    """What the applicant, the identity document and the model say."""
    purpose = LoanRequest.PurposeKind.Name(item.loan.purpose_kind).removeprefix("PURPOSE_KIND_")
    stated = [
        ("request.purpose_kind", Value(text=purpose), "declared"),
        ("request.amount_fen", Value(integer=item.loan.amount_fen), "declared"),
        ("request.term_months", Value(integer=item.loan.term_months), "declared"),
        ("score.pd", Value(number=item.score.pd), "model"),
    ]
    if item.HasField("age_years"):
        stated.append(("request.age_years", Value(integer=item.age_years), "identity"))
        at_end = age_at_end(item.age_years, term_months)
        stated.append(("request.age_at_end_years", Value(integer=at_end), "identity"))
    if item.declaration.HasField("monthly_income_fen"):
        income = Value(integer=item.declaration.monthly_income_fen)
        stated.append(("declared.monthly_income_fen", income, "declared"))
    return stated


def age_at_end(age_years: int, term_months: int) -> int:
    """The least age at the end of the term: the birthday is not known here, and doubt is the applicant's."""
    return age_years + term_months // 12


def today(now: dt.datetime) -> dt.date:
    """The day whose law applies: China's."""
    return now.astimezone(dt.timezone(dt.timedelta(hours=8))).date()
