"""What is known of an applicant when policy looks: facts, who said them, and which sources are silent."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest
from lending.type.v1.loan_pb2 import LoanRequest
from lending.type.v1.reason_pb2 import Fact, Value

_COMPLETE = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND})
_PURPOSES = {kind: name.removeprefix("PURPOSE_KIND_") for name, kind in LoanRequest.PurposeKind.items()}
_USABLE = _COMPLETE | {SourceReport.STATE_STALE}


@dataclass(frozen=True)
class Evidence:
    """Values by name, where each came from, and the sources by how they answered."""

    values: Mapping[str, Any]
    said: Mapping[str, SourceReport]
    """In which report each fact of a source stands."""
    stated: Mapping[str, str]
    """Who states the other facts: the applicant, the identity document, the model."""
    complete: frozenset[str]
    """Sources whose answer a decline may rest on."""
    usable: frozenset[str]
    """Sources whose answer an approval may rest on: the complete ones and those with an older answer."""

    def integer(self, name: str) -> int | None:
        """A whole-number fact; None where unknown."""
        value = self.values.get(name)
        return int(value) if value is not None else None

    def fact(self, name: str, condition: str = "") -> Fact:
        """The fact in its wire form, built only for the few that a reason shows; without a value where unknown."""
        if name in self.stated:
            value = _wire(self.values[name])
            return Fact(attribute=name, value=value, source=self.stated[name], condition=condition)
        if name not in self.said:
            return Fact(attribute=name, condition=condition)
        report = self.said[name]
        # What is said last counts, as in `_facts`.
        attribute = next(a for a in reversed(report.attributes) if a.name == name and a.value.WhichOneof("kind"))
        fact = Fact(attribute=name, value=attribute.value, source=report.source, condition=condition)
        if attribute.HasField("observed_time"):
            fact.observed_time.CopyFrom(attribute.observed_time)
        elif report.HasField("observed_time"):
            fact.observed_time.CopyFrom(report.observed_time)
        return fact


def evidence(
    item: PriceApplicationsRequest.Item, types: Mapping[str, Mapping[str, str]], now: dt.datetime, term_months: int
) -> Evidence:
    """All that is known of one application, for a loan of that term.

    types  by source: the facts that are its to state, each with its kind of value.
    An answer that states a fact as another kind of value than the dictionary says is no answer: a fault at the
    source must not decide.
    """
    values: dict[str, Any] = {}
    said: dict[str, SourceReport] = {}
    complete, usable = set(), set()
    now_s = now.timestamp()
    for report in item.profile.reports:
        state, source = report.state, report.source
        if state not in _USABLE or (facts := _facts(report, types.get(source, {}))) is None:
            continue
        usable.add(source)
        expired = report.HasField("usable_until_time") and report.usable_until_time.seconds <= now_s
        if state in _COMPLETE and not expired:
            complete.add(source)
        values.update(facts)
        said.update(dict.fromkeys(facts, report))
    stated = _stated(item, term_months)
    values.update({name: value for name, (value, _) in stated.items()})
    origins = {name: source for name, (_, source) in stated.items()}
    return Evidence(values, said, origins, frozenset(complete), frozenset(usable))


def _facts(report: SourceReport, types: Mapping[str, str]) -> dict[str, Any] | None:
    """The facts of one report that are its source's to state; None when one has the wrong kind."""
    facts: dict[str, Any] = {}
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
        facts[name] = value
    return facts


def _stated(item: PriceApplicationsRequest.Item, term_months: int) -> dict[str, tuple[str | int | float, str]]:
    """What the applicant, the identity document and the model say, and which of them."""
    loan = item.loan
    stated: dict[str, tuple[str | int | float, str]] = {
        "request.purpose_kind": (_PURPOSES[loan.purpose_kind], "declared"),
        "request.amount_fen": (loan.amount_fen, "declared"),
        "request.term_months": (loan.term_months, "declared"),
        "score.pd": (item.score.pd, "model"),
    }
    if item.HasField("age_years"):
        stated["request.age_years"] = (item.age_years, "identity")
        stated["request.age_at_end_years"] = (age_at_end(item.age_years, term_months), "identity")
    if item.declaration.HasField("monthly_income_fen"):
        stated["declared.monthly_income_fen"] = (item.declaration.monthly_income_fen, "declared")
    return stated


def _wire(value: str | int | float) -> Value:
    match value:
        case str():
            return Value(text=value)
        case int():
            return Value(integer=value)
        case float():
            return Value(number=value)


def age_at_end(age_years: int, term_months: int) -> int:
    """The least age at the end of the term: the birthday is not known here, and doubt is the applicant's."""
    return age_years + term_months // 12


@lru_cache(maxsize=16)
def stamp(at: dt.datetime) -> Timestamp:
    """The time in its wire form, to be copied from: made once for all of a batch."""
    made = Timestamp()
    made.FromDatetime(at)
    return made


def today(now: dt.datetime) -> dt.date:
    """The day whose law applies: China's."""
    return now.astimezone(dt.timezone(dt.timedelta(hours=8))).date()
