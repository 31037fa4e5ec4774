"""What the longer calls answer."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass

from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.errors import CallFailed

State = pb.Application.State
DECIDED = frozenset({State.STATE_DECIDED, State.STATE_OFFER_ACCEPTED, State.STATE_WITHDRAWN, State.STATE_EXPIRED})
"""States in which nothing more will be decided."""
WAITS_FOR_PEOPLE = frozenset({State.STATE_AWAITING_INFORMATION, State.STATE_IN_REVIEW})
"""States in which waiting a few seconds more is of no use."""


@dataclass(frozen=True, slots=True)
class Decided:
    """There is a decision (or the application was withdrawn, or has expired: `application.state` says so)."""

    request_id: str
    application: pb.Application


@dataclass(frozen=True, slots=True)
class Pending:
    """Safely stored, and decided later: `watch(application.name)` tells when."""

    request_id: str
    application: pb.Application

    @property
    def estimate_at(self) -> dt.datetime | None:
        """When the decision is expected, UTC; None where it waits for a person."""
        known = self.application.HasField("estimate_time")
        return self.application.estimate_time.ToDatetime(dt.UTC) if known else None

    @property
    def waiting_for(self) -> Sequence[str]:
        """Why it is not decided yet, e.g. `source_missing:tax`."""
        return tuple(self.application.waiting_for)

    @property
    def missing(self) -> Sequence[pb.MissingInformation]:
        """What the applicant must supply before it can go on; empty where it goes on by itself."""
        return tuple(self.application.missing_information)


@dataclass(frozen=True, slots=True)
class Submitted:
    """One of many, safely stored.

    position     place in the iterable, from 0
    application  as stored; None where an earlier run got its acknowledgement: `get(name)` reads it
    """

    position: int
    request_id: str
    name: str
    application: pb.Application | None


@dataclass(frozen=True, slots=True)
class Refused:
    """One of many that the mesh does not take, and would not take again."""

    position: int
    request_id: str
    error: CallFailed
