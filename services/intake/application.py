"""What an application is: its states, which change is legal, what makes a request sound. Pure."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from lending.intake.v1.intake_service_pb2 import Application
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.errors import WrongState
from loanmesh.runtime.identity import age_on, valid_credit_code, valid_resident_id
from services.intake.privacy import Cover

OUTPUT_ONLY = (
    "name", "state", "create_time", "update_time", "estimate_time", "waiting_for", "missing_information",
    "due_time", "decision", "accepted_offer_id", "revision", "erase_time",
)  # fmt: skip


class State(StrEnum):
    """Where an application stands; the words are those of the contract without the prefix."""

    PENDING = "PENDING"
    AWAITING_INFORMATION = "AWAITING_INFORMATION"
    IN_REVIEW = "IN_REVIEW"
    DECIDED = "DECIDED"
    OFFER_ACCEPTED = "OFFER_ACCEPTED"
    WITHDRAWN = "WITHDRAWN"
    EXPIRED = "EXPIRED"
    PARKED = "PARKED"
    """Out of the way until a person has looked. Told to nobody but the SRE: for its caller it is pending."""

    @property
    def shown(self) -> State:
        """As callers see it."""
        return State.PENDING if self is State.PARKED else self


AGE_YEARS_MAX = 130
CLOCK_SKEW_S = 300.0
"""How far ahead a caller's clock may run."""
FINAL = frozenset({State.DECIDED, State.OFFER_ACCEPTED, State.WITHDRAWN, State.EXPIRED})
"""States in which a watcher need not wait for a decision any more."""

_ALLOWED_FROM = {
    "accept an offer of": {State.DECIDED},
    "withdraw": {State.PENDING, State.PARKED, State.AWAITING_INFORMATION, State.IN_REVIEW, State.DECIDED},
    "supply information to": {State.AWAITING_INFORMATION},
    "release": {State.PARKED},
}
_WAY_OUT = {
    State.PENDING: "WatchApplication tells when it is decided",
    State.AWAITING_INFORMATION: "SupplyInformation adds what is missing",
    State.IN_REVIEW: "WatchApplication tells when it is decided",
    State.DECIDED: "GetApplication shows the decision",
    State.OFFER_ACCEPTED: "GetApplication shows which offer",
    State.WITHDRAWN: "submit a new application",
    State.EXPIRED: "submit a new application",
}


def require_allowed(change: str, application_id: str, state: State) -> None:
    """Raise WrongState, naming thing, state and way out, when the state does not allow the change."""
    if state not in _ALLOWED_FROM[change]:
        allowed = " or ".join(
            sorted({state.shown if change != "release" else state for state in _ALLOWED_FROM[change]})
        )
        raise WrongState(
            f"cannot {change} application {application_id}: it is {state.shown}, not {allowed};"
            f" {_WAY_OUT[state.shown]}",
            state=state.shown.value,
        )


def erased(application_id: str, at: float) -> WrongState:
    """The error for what cannot be done or told any more."""
    on = dt.datetime.fromtimestamp(at, dt.UTC).date().isoformat()
    return WrongState(
        f"the content of application {application_id} was erased on {on}; ListEvents tells what is kept", state="ERASED"
    )


@dataclass(frozen=True)
class New:
    """An application about to be stored."""

    id: str
    lender: str
    client_id: str
    request_id: str
    payload: bytes
    payload_hash: str
    priority: int
    channel: str
    created_at: float
    traceparent: str = ""
    """W3C trace context of the call that brought it; '' where it is not traced."""
    numbers: tuple[str, ...] = field(default=(), repr=False)
    """Identity numbers of its parties, by whose hashes it is found."""


@dataclass(frozen=True)
class Stored:
    """What came of storing: the row in force, and whether it was there before."""

    id: str
    payload_hash: str
    existed: bool
    claim: Claim | None = None
    """Our own lease on it; None when it was there before, or waits in the store for whoever is free."""


@dataclass(frozen=True)
class Claim:
    """Our right to decide one application: valid while the fence is ours."""

    id: str
    lender: str
    fence: int
    assessment: int
    attempts: int
    revision: int
    event_hash: str
    payload: bytes
    waiting_for: str
    created_at: float
    priority: int = 1
    not_before: float = 0.0
    """Its place in the queue: when it came, or may be looked at again, by the database's clock."""
    traceparent: str = ""
    faults: int = 0
    """At how many attempts it broke a stage."""
    supplied: bool = False
    """Whether its applicant was asked for something and supplied it: it was not us alone that it waited for."""
    lost_lease: str = ""
    """`owner@seconds`: who held it before us and until when, where that lease ended by itself; '' else."""
    cover: Cover | None = field(default=None, repr=False, compare=False)
    """How its content is kept; None where it comes from no store."""

    @property
    def trace_id(self) -> str:
        """The trace it came with, 32 hexadecimal digits; '' where it was not traced."""
        parts = self.traceparent.split("-")
        return parts[1] if len(parts) == 4 else ""


@dataclass(frozen=True)
class Snapshot:
    """An application as it stands, for readers. Times are seconds since 1970."""

    id: str
    lender: str
    payload: bytes
    state: State
    not_before: float
    waiting_for: tuple[str, ...]
    missing: tuple[dict[str, str], ...]
    due_at: float | None
    assessment: int
    accepted_offer: str
    revision: int
    created_at: float
    updated_at: float
    decision: bytes | None
    priority: int = 1
    erased_at: float | None = None
    """When its personal content was erased; payload and decision are empty then."""


def as_stored(new: New) -> Snapshot:
    """A new application as it stands right after it was stored."""
    return Snapshot(
        id=new.id, lender=new.lender, payload=new.payload, state=State.PENDING, not_before=new.created_at,
        waiting_for=(), missing=(), due_at=None, assessment=1, accepted_offer="", revision=1, created_at=new.created_at,
        updated_at=new.created_at, decision=None, priority=new.priority,
    )  # fmt: skip


@dataclass(frozen=True)
class ParkedView:
    """A parked application, as the SRE sees it; `details` are those of its `parked` event."""

    lender: str
    id: str
    parked_at: float
    due_at: float
    details: dict[str, str]


@dataclass(frozen=True)
class Happening:
    """An event as stored."""

    seq: int
    kind: str
    at: float
    actor: str
    details: dict[str, str] = field(default_factory=dict)
    hash: str = ""


_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def chain(before: str, application_id: str, event: Happening) -> str:
    """Hash of an event over all it says and the hash before it, SHA-256 hexadecimal; '' comes before the first."""
    said = [before, application_id, event.seq, event.kind, repr(event.at), event.actor, event.details]
    return hashlib.sha256(_canonical(said).encode()).hexdigest()


def borrower(application: Application) -> Party:
    """The one party that owes the loan. Only after `unsound` found nothing."""
    return next(party for party in application.parties if party.role == Party.ROLE_BORROWER)


def inputs_of(application: Application) -> Application:
    """A copy with what the caller may say, without what only we may."""
    copy = Application()
    copy.CopyFrom(application)
    for name in OUTPUT_ONLY:
        copy.ClearField(name)  # type: ignore[arg-type]  # The names are checked by a test.
    return copy


def digest(said: bytes) -> str:
    """SHA-256 of a message in its deterministic form, hexadecimal."""
    return hashlib.sha256(said).hexdigest()


def unsound(application: Application, now: dt.datetime) -> Iterator[tuple[str, str]]:
    """Violations, as (field, rule), of rules that span fields; the contract states those of single ones."""
    borrowers = sum(party.role == Party.ROLE_BORROWER for party in application.parties)
    if borrowers != 1:
        yield "application.parties", f"must have exactly one party with role ROLE_BORROWER, has {borrowers}"
    for index, party in enumerate(application.parties):
        where = f"application.parties[{index}].identity"
        person = party.kind == Party.KIND_PERSON
        kind = Identity.KIND_RESIDENT_ID if person else Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE
        if party.identity.kind != kind:
            yield f"{where}.kind", f"must be {Identity.Kind.Name(kind)} for a {'person' if person else 'firm'}"
        # The value is personal data: the rule is named, never the value.
        elif not (valid_resident_id if person else valid_credit_code)(party.identity.value):
            yield f"{where}.value", "check character does not fit the number"
        elif person and not 0 <= (age_on(party.identity.value, now.date()) or 0) <= AGE_YEARS_MAX:
            yield f"{where}.value", f"date of birth must lie in the last {AGE_YEARS_MAX} years"
    latest_s = now.timestamp() + CLOCK_SKEW_S
    for index, consent in enumerate(application.consents):
        where = f"application.consents[{index}]"
        given_s = consent.given_time.seconds
        if given_s > latest_s:
            yield f"{where}.given_time", "must not lie in the future"
        if consent.HasField("expire_time") and consent.expire_time.seconds < given_s:
            yield f"{where}.expire_time", "must not be before given_time"


def differing(one: Message, other: Message, path: str = "") -> Iterator[str]:
    """Paths of the fields in which two messages of a type differ; lists are compared as a whole."""
    for descriptor in one.DESCRIPTOR.fields:
        here = f"{path}{descriptor.name}"
        a, b = getattr(one, descriptor.name), getattr(other, descriptor.name)
        if a == b and (not descriptor.has_presence or one.HasField(descriptor.name) == other.HasField(descriptor.name)):
            continue
        if descriptor.type == FieldDescriptor.TYPE_MESSAGE and not descriptor.is_repeated:
            yield from differing(a, b, f"{here}.") if a != b else iter([here])
        else:
            yield here
