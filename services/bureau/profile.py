"""What a source said, kept as it was, and how it stands in the profile. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lending.bureau.v1.bureau_service_pb2 import SourceReport

from services.bureau.freshness import fresh_until, is_fresh
from services.bureau.sources import Source


@dataclass(frozen=True)
class Answer:
    """One source's answer about one subject. Times are seconds since 1970."""

    found: bool
    """False: the source does not know the subject, which is a fact too."""
    facts: Mapping[str, Any]
    observed_at: float
    fetched_at: float

    @cached_property
    def told(self) -> dict[SourceReport.State.ValueType, SourceReport]:
        """Its report in each state it was told in: made once, as an answer in the cache is told many times."""
        return {}

    def to_json(self) -> str:
        """As stored."""
        return json.dumps([self.found, self.facts, self.observed_at, self.fetched_at])

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """From how it was stored."""
        return cls(*json.loads(text))


@dataclass(frozen=True)
class Missing:
    """No answer now, why, and when to look again (seconds since 1970)."""

    cause: str
    retry_at: float


def report(source: Source, answer: Answer | Missing | None, now_s: float, degradation: str = "") -> SourceReport:
    """The report of one source, to be copied before it is changed; None stands for no consent.

    degradation  the step because of which the source was not asked.
    """
    if answer is None:
        return SourceReport(source=source.id, state=SourceReport.STATE_NO_CONSENT)
    if isinstance(answer, Missing):
        missing = SourceReport(source=source.id, state=SourceReport.STATE_MISSING, missing_cause=answer.cause)
        missing.degradation = degradation
        missing.retry_time.FromMicroseconds(int(answer.retry_at * 1e6))
        return missing
    state = SourceReport.STATE_STALE
    if is_fresh(answer.observed_at, source, now_s):
        state = SourceReport.STATE_FRESH if answer.found else SourceReport.STATE_NOT_FOUND
    if state not in answer.told:
        answer.told[state] = _told(source, answer, state)
    if not degradation:
        return answer.told[state]
    made = SourceReport()
    made.CopyFrom(answer.told[state])
    made.degradation = degradation
    return made


def _told(source: Source, answer: Answer, state: SourceReport.State.ValueType) -> SourceReport:
    made = SourceReport(source=source.id, state=state)
    made.observed_time.FromMicroseconds(int(answer.observed_at * 1e6))
    made.fetched_time.FromMicroseconds(int(answer.fetched_at * 1e6))
    made.usable_until_time.FromMicroseconds(int(fresh_until(answer.observed_at, source) * 1e6))
    add_facts(made, answer.facts)
    return made


def add_facts(made: SourceReport, facts: Mapping[str, Any]) -> None:
    """State facts in a report, each by its type."""
    for name, value in facts.items():
        attribute = made.attributes.add(name=name)
        match value:
            case bool():
                attribute.value.flag = value
            case int():
                attribute.value.integer = value
            case float():
                attribute.value.number = value
            case _:
                attribute.value.text = str(value)
