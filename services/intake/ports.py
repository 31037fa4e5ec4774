"""What the pipeline needs of the world: a store and three services. Fakes and the real ones both fit."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1.intake_service_pb2 import Application
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.party_pb2 import Party

from services.intake.application import Claim, Happening, New, ParkedView, Snapshot, State, Stored


@dataclass(frozen=True)
class Unavailable:
    """A stage could not answer for one application. A value, not an exception: it can only make things later."""

    cause: str
    """Stable word for the event and the caller, e.g. `scoring_unavailable`."""
    retry_s: float | None = None
    """When to try again; None: after the usual backoff."""
    missing_sources: tuple[str, ...] = ()
    """Sources whose absence is the reason."""
    overloaded: bool = False
    """Whether it was asked too much, and nothing is wrong with it."""
    status: str = ""
    """Name of the status that a failed call ended with; '' where none was made, or none failed."""
    detail: str = ""
    """For a person: what the transport or the breaker said."""


@dataclass(frozen=True)
class Unfit:
    """A stage says that the request itself cannot be answered, e.g. a product that does not exist."""

    field: str
    reason: str


@dataclass(frozen=True)
class Broken:
    """A stage broke on one application: the fault of its content or of our code, not of a dependency that is away."""

    cause: str
    """Stable word, e.g. `scoring_error`."""
    error_type: str
    """Type of the error, never its text."""


@dataclass
class Case:
    """One application on its way through the stages; each stage adds what it found."""

    claim: Claim
    application: Application
    party: Party
    """Who owes the loan."""
    profile: CreditProfile | None = None
    score: Score | None = None
    pricing: Pricing | None = None
    age_years: int | None = None
    as_of: dt.datetime | None = None
    """As of when it is priced: by intake's clock, and in a replay as it was. None: by pricing's clock."""
    traceparent: str = ""
    """W3C trace context of the stage under way; '' where nobody follows it."""

    @property
    def gathered(self) -> CreditProfile:
        """The profile, in the stages after gathering."""
        assert self.profile is not None
        return self.profile

    @property
    def scored(self) -> Score:
        """The score, in the stages after scoring."""
        assert self.score is not None
        return self.score


@dataclass(frozen=True)
class Decided:
    """A decision ready to commit."""

    claim: Claim
    outcome: str
    grade: str
    decision: bytes
    profile: bytes
    score: bytes
    pricing: bytes
    decided_at: float
    due_at: float | None
    details: dict[str, str]
    product: str = ""
    """The product decided on; one of policy's."""


@dataclass(frozen=True)
class Deferred:
    """Not decidable now; try again."""

    claim: Claim
    waiting_for: tuple[str, ...]
    retry_s: float
    at: float
    overloaded: bool = False
    """Turned away as too much at once: it keeps its place in the queue, and the worker slows down."""
    broke: bool = False
    """Whether it broke a stage: counted, and at the last of several such attempts it is parked instead."""


@dataclass(frozen=True)
class Parked:
    """Broke a stage at each of several attempts: out of the way until a person has looked."""

    claim: Claim
    stage: str
    broken: Broken
    due_at: float
    at: float


@dataclass(frozen=True)
class Awaiting:
    """Not decidable without something from the applicant."""

    claim: Claim
    missing: tuple[dict[str, str], ...]
    due_at: float
    at: float


Result = Decided | Deferred | Awaiting | Parked
Answer = Unavailable | Unfit | Broken
"""What a stage says of an application when it has no answer."""


class Bureau(Protocol):
    """Gathers profiles; one answer a case, in order; never raises."""

    async def gather(self, cases: Sequence[Case]) -> Sequence[CreditProfile | Answer]: ...


class Scoring(Protocol):
    """Scores profiles; one answer a case, in order; never raises."""

    async def score(self, cases: Sequence[Case]) -> Sequence[Score | Answer]: ...


class Pricer(Protocol):
    """Prices applications; one answer a case, in order; never raises."""

    async def price(self, cases: Sequence[Case]) -> Sequence[Pricing | Answer]: ...


class Settlement(Protocol):
    """The part of the store that the pipeline writes to."""

    async def settle(self, results: Sequence[Result]) -> set[str]:
        """Commit results whose fence still holds; the ids that were. Raises DependencyDown."""
        ...


Apply = Callable[[State, Callable[[], bytes], Callable[[], bytes | None]], dict[str, object]]
"""A change: takes the state, and ways to read payload and decision, which raise WrongState where they cannot be read or
DependencyDown while their key is away; raises a CallerError, or answers the columns to set."""


class Records(Protocol):
    """The part of the store that answers callers. What each promises stands in `store`."""

    async def accept(self, batch: Sequence[tuple[New, bool]]) -> list[Stored]: ...
    async def get(self, lender: str, application_id: str) -> Snapshot: ...
    async def changed(self, lender: str, application_id: str) -> Snapshot: ...
    async def submitted(self, lender: str, application_id: str) -> bytes: ...
    async def get_many(self, ids: Sequence[str]) -> dict[str, Snapshot]: ...
    async def page(
        self, lender: str, page_size: int, page_token: str, filter_: str, order_by: str
    ) -> tuple[list[Snapshot], str]: ...
    async def events(self, lender: str, application_id: str) -> list[Happening]: ...
    async def decision_with_evidence(
        self, lender: str, application_id: str, assessment: int
    ) -> tuple[bytes, bytes, bytes, bytes] | None: ...
    async def change(
        self,
        lender: str,
        application_id: str,
        request_id: str,
        said: Mapping[str, str],
        kind: str,
        details: dict[str, str],
        apply: Apply,
    ) -> None: ...
    async def parked(self, page_size: int, page_token: str, cause: str) -> tuple[list[ParkedView], str]: ...
