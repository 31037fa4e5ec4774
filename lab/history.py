"""What was seen of the mesh from outside, written down.

A run (of real processes, or of the simulator) is written down as plain records with times: what was submitted,
acknowledged, read, decided, accepted, and how everything stood at the end. Whether it can be true, `judge.py` says.

    recorder = Recorder(now)
    recorder.submitted("shop-1", request_id)
    recorder.acknowledged("shop-1", request_id, await client.submit(...))
    ...
    for violation in check(recorder.records):
        print(violation)

A *reader* is one who asks one thing after another; answers that were awaited side by side are two readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import TextIO

from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.intake.v1 import intake_service_pb2 as pb

FINAL = frozenset({"DECIDED", "OFFER_ACCEPTED", "WITHDRAWN", "EXPIRED"})
PARKED = "parked"
"""What a parked application waits for: an SRE, who owns it until it is released."""
SRE = "sre"


# --- Records. `at` is when it was seen, in seconds of whatever clock the recorder was handed. ---


@dataclass(frozen=True)
class Submitted:
    """A client asked to store an application; whether it was is not known yet."""

    at: float
    client: str
    request_id: str


@dataclass(frozen=True)
class Acknowledged:
    """The mesh said that it is stored."""

    at: float
    client: str
    request_id: str
    name: str
    revision: int
    state: str


@dataclass(frozen=True)
class Read:
    """Somebody was shown an application. `digest` is the decision's, '' where none was shown."""

    at: float
    reader: str
    name: str
    revision: int
    state: str
    assessment: int
    digest: str
    accepted_offer: str


@dataclass(frozen=True)
class Offer:
    """One offer of a decision."""

    id: str
    principal_fen: int


@dataclass(frozen=True)
class Report:
    """How one source stood in the evidence; `usable_until` in seconds since 1970, None where there was no answer."""

    source: str
    state: str
    usable_until: float | None


@dataclass(frozen=True)
class Decided:
    """A decision as shown. `reports` is empty unless it was explained; `decided_at` in seconds since 1970."""

    at: float
    name: str
    assessment: int
    outcome: str
    digest: str
    decided_at: float
    offers: tuple[Offer, ...]
    reports: tuple[Report, ...] = ()


@dataclass(frozen=True)
class AcceptAsked:
    """A client asked to accept an offer; whether it was is not known yet."""

    at: float
    client: str
    name: str
    offer_id: str


@dataclass(frozen=True)
class Accepted:
    """The mesh said that the offer is accepted."""

    at: float
    client: str
    name: str
    offer_id: str


@dataclass(frozen=True)
class Event:
    """One entry of an application's own history."""

    seq: int
    kind: str
    assessment: str


@dataclass(frozen=True)
class Told:
    """An application's whole history, as the mesh tells it."""

    at: float
    name: str
    events: tuple[Event, ...]
    chain_intact: bool


@dataclass(frozen=True)
class Standing:
    """How an application stands at the end of the run.

    owner  who works on it, where that can be seen from outside; else ''. A parked one is the SRE's.
    due_at, estimate_at  by when something must happen or is expected, seconds since 1970; None where nothing is said.
    """

    at: float
    name: str
    revision: int
    state: str
    assessment: int
    digest: str
    accepted_offer: str
    owner: str
    due_at: float | None
    estimate_at: float | None


Record = Submitted | Acknowledged | Read | Decided | AcceptAsked | Accepted | Told | Standing
_KINDS: dict[str, type[Record]] = {
    kind.__name__: kind for kind in (Submitted, Acknowledged, Read, Decided, AcceptAsked, Accepted, Told, Standing)
}
_PARTS = {"offers": Offer, "reports": Report, "events": Event}


# --- Writing down ---


class Recorder:
    """Turns what a caller of the mesh sees into records.

    now   where `at` comes from.
    sink  each record is also written there at once, as one JSON line: a run that is killed leaves its history.
    """

    def __init__(self, now: Callable[[], float], sink: TextIO | None = None) -> None:
        self.records: list[Record] = []
        self._now = now
        self._sink = sink
        self._decisions: set[tuple[str, int, str]] = set()

    def add(self, record: Record) -> None:
        """Append a record made elsewhere."""
        self.records.append(record)
        if self._sink:
            self._sink.write(_to_line(record))

    def submitted(self, client: str, request_id: str) -> None:
        """A client is about to submit."""
        self.add(Submitted(self._now(), client, request_id))

    def acknowledged(self, client: str, request_id: str, application: pb.Application, reader: str = "") -> None:
        """The answer to a submit; it is a read, too, by `reader` where the client is several."""
        name, state = application.name, _state(application)
        self.add(Acknowledged(self._now(), client, request_id, name, application.revision, state))
        self.read(reader or client, application)

    def read(self, reader: str, application: pb.Application) -> None:
        """An application as GetApplication, WatchApplication or a change showed it (lists leave reasons out)."""
        assessment, digest = self._decision(application)
        self.add(
            Read(self._now(), reader, application.name, application.revision, _state(application), assessment, digest,
                 application.accepted_offer_id)
        )  # fmt: skip

    def explained(self, name: str, response: pb.ExplainDecisionResponse) -> None:
        """A decision with the evidence it rests on."""
        self.add(_decided(self._now(), name, response.decision, response.profile.reports))

    def accept_asked(self, client: str, name: str, offer_id: str) -> None:
        """A client is about to accept an offer."""
        self.add(AcceptAsked(self._now(), client, name, offer_id))

    def accepted(self, client: str, offer_id: str, application: pb.Application, reader: str = "") -> None:
        """The answer to an acceptance; it is a read, too."""
        self.add(Accepted(self._now(), client, application.name, offer_id))
        self.read(reader or client, application)

    def told(self, name: str, events: Iterable[pb.Event], chain_intact: bool) -> None:
        """An application's whole history, all pages of it."""
        seen = tuple(Event(int(e.name.rsplit("/", 1)[1]), e.kind, e.details.get("assessment", "")) for e in events)
        self.add(Told(self._now(), name, seen, chain_intact))

    def standing(self, application: pb.Application, owner: str = "") -> None:
        """How an application stands when the run is over."""
        assessment, digest = self._decision(application)
        self.add(
            Standing(
                self._now(), application.name, application.revision, _state(application), assessment, digest,
                application.accepted_offer_id, SRE if PARKED in application.waiting_for else owner,
                _seconds(application.due_time) if application.HasField("due_time") else None,
                _seconds(application.estimate_time) if application.HasField("estimate_time") else None,
            )
        )  # fmt: skip

    def _decision(self, application: pb.Application) -> tuple[int, str]:
        """Assessment and digest of the decision shown; a decision not seen before is written down."""
        if not application.HasField("decision"):
            return 0, ""
        decided = _decided(self._now(), application.name, application.decision, ())
        key = (decided.name, decided.assessment, decided.digest)
        if key not in self._decisions:
            self._decisions.add(key)
            self.add(decided)
        return decided.assessment, decided.digest


def digest_of(decision: pb.Decision) -> str:
    """Short hash of what was decided. Texts do not count: they are made when somebody asks for them."""
    bare = pb.Decision()
    bare.CopyFrom(decision)
    for reason in bare.reasons:
        reason.ClearField("text_zh")
        reason.ClearField("text_en")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()[:16]


def _decided(at: float, name: str, decision: pb.Decision, reports: Iterable[SourceReport]) -> Decided:
    return Decided(
        at, name, decision.assessment, pb.Decision.Outcome.Name(decision.outcome).removeprefix("OUTCOME_"),
        digest_of(decision), _seconds(decision.decide_time),
        tuple(Offer(o.offer_id, o.principal_fen) for o in decision.offers),
        tuple(
            Report(
                r.source, SourceReport.State.Name(r.state).removeprefix("STATE_"),
                _seconds(r.usable_until_time) if r.HasField("usable_until_time") else None,
            )
            for r in reports
        ),
    )  # fmt: skip


def _state(application: pb.Application) -> str:
    return pb.Application.State.Name(application.state).removeprefix("STATE_")


def _seconds(time: object) -> float:
    return time.ToNanoseconds() / 1e9  # type: ignore[attr-defined, no-any-return]  # Timestamps' stubs lack a Protocol.


# --- Keeping ---


def write(history: Iterable[Record], sink: TextIO) -> None:
    """One JSON line a record; the same history gives the same bytes."""
    sink.writelines(_to_line(record) for record in history)


def read(source: Iterable[str]) -> list[Record]:
    """A history that was written down. Raises KeyError or TypeError for a line that is no record."""
    return [_from_line(line) for line in source if line.strip()]


def _to_line(record: Record) -> str:
    return json.dumps({"record": type(record).__name__, **asdict(record)}, ensure_ascii=False) + "\n"


def _from_line(line: str) -> Record:
    said = json.loads(line)
    kind = _KINDS[said.pop("record")]
    for name, part in _PARTS.items():
        if name in said:
            said[name] = tuple(part(**one) for one in said[name])
    return kind(**said)
