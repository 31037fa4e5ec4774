"""Builders that show only what a test is about."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping

from google.protobuf import json_format
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, SourceReport
from lending.intake.v1.intake_service_pb2 import Application

from lab.population import SOURCES, Kind, Population
from loanmesh.runtime.clock import Clock, FakeClock
from loanmesh.runtime.keys import Keys, new_ring
from loanmesh.runtime.sealed import Sealer
from services.bureau.profile import add_facts

NOW = FakeClock().now()
POPULATION = Population(seed=1)
RING = new_ring(NOW - dt.timedelta(days=1))
"""Keys of this run of the tests."""


def a_sealer(clock: Clock | None = None) -> Sealer:
    """A sealer with the keys of this run."""
    return Sealer(Keys(RING, clock or FakeClock()))


def an_application(kind: Kind = "person", index: int = 1, now: dt.datetime = NOW) -> Application:
    """What a synthetic subject would send."""
    return json_format.ParseDict(POPULATION.application(kind, index, now), Application())


def a_report(
    source: str, facts: Mapping[str, object], state: SourceReport.State.ValueType, now: dt.datetime
) -> SourceReport:
    """One source's report, observed now and good for a day."""
    report = SourceReport(source=source, state=state)
    if state in (SourceReport.STATE_FRESH, SourceReport.STATE_STALE, SourceReport.STATE_NOT_FOUND):
        report.observed_time.FromDatetime(now)
        report.fetched_time.FromDatetime(now)
        report.usable_until_time.FromDatetime(now + dt.timedelta(days=1))
        add_facts(report, facts)
    return report


def a_profile(
    kind: Kind = "firm",
    index: int = 1,
    states: Mapping[str, SourceReport.State.ValueType] | None = None,
    now: dt.datetime = NOW,
    **changed: object,
) -> CreditProfile:
    """A subject's profile; `states` sets how sources answered, `changed` facts as `court__is_dishonest_debtor=True`."""
    facts = dict(POPULATION.subject(kind, index).facts)
    facts.update({name.replace("__", "."): value for name, value in changed.items()})
    profile = CreditProfile()
    profile.gather_time.FromDatetime(now)
    for source in SOURCES:
        prefix = {"central_bank": "credit.", "bank_flow": "bank."}.get(source, f"{source}.")
        said = {name: value for name, value in facts.items() if name.startswith(prefix) and value is not None}
        state = (states or {}).get(source, SourceReport.STATE_FRESH)
        profile.reports.append(a_report(source, said, state, now))
    return profile


def once_each(items: Iterable[str]) -> dict[str, int]:
    """Each of the items, once."""
    return dict.fromkeys(items, 1)
