"""Why applications failed or came late: one root cause each, from what their traces tell. Pure.

A trace often tells of several troubles, of which one brought about the others: an open breaker of the failures before
it, a wait of the replica that died. So each application is given the first of these that its trace shows: parked, the
database, a lost lease, a service, a source, the door, the caller's deadline, the queue. And "breaker open" is read as
what the breaker saw, in this window or in its own words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loanmesh.runtime import semconv
from loanmesh.seeing.spans import Span

SLOW_S = 0.5
"""A commit, a source or a hop that took this long made its application late."""
METHODS_OF = {
    "bureau": "lending.bureau.v1.BureauService/GatherProfiles",
    "scoring": "lending.scoring.v1.ScoringService/ScoreProfiles",
    "pricing": "lending.pricing.v1.PricingService/PriceApplications",
}
"""How intake asks each service behind it."""
_SERVICES = {method: service for service, method in METHODS_OF.items()}
_CERTIFICATE = re.compile(r"certificate|handshake|\bssl\b|\btls\b", re.IGNORECASE)
_FULL = re.compile(r"disk is full|no space|disk I/O|disk quota|file too large|FullError", re.IGNORECASE)
_BUSY = re.compile(r"locked|busy|timed? ?out|timeout|did not answer", re.IGNORECASE)


@dataclass(frozen=True)
class Cause:
    """A root cause.

    kind    stable word, e.g. `source_down`.
    hop     who called whom, e.g. `bureau -> court`.
    status  how the call ended, in a stable word.
    what    a sentence for a person.
    then    the command to run next.
    """

    kind: str
    hop: str
    status: str
    what: str
    then: str

    @property
    def key(self) -> tuple[str, str]:
        """Two causes of one key are one."""
        return (self.kind, self.hop)


@dataclass
class Group:
    """Everything that failed or came late for one cause."""

    cause: Cause
    count: int
    example: str
    """The newest application's id; a trace id where nothing was stored."""
    breaker: str
    """What the breaker on the way says, '' where none has opened."""
    first_at: float
    last_at: float
    undecided: int
    """How many of them are stored and, as far as is told, not decided yet."""
    decided_at: float | None
    """When the last of those that are decided was; None: none is."""

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.undecided == 0 and self.decided_at is not None


@dataclass
class _Case:
    """What is known of one application, or of one call that stored none."""

    id: str
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class _Evidence:
    """What the whole window tells."""

    behind: Mapping[str, str]
    """Per source or service: what failed most before its breaker opened."""
    seen: Mapping[str, float]
    alive: Collection[str]
    troubles: Sequence[tuple[float, Cause]] = ()
    """When services and the database failed, and how: what waited meanwhile waited for them."""


def why_failed(spans: Sequence[Span], seen: Mapping[str, float], alive: Collection[str] = ()) -> list[Group]:
    """Causes of all that failed or came late, the most frequent first.

    seen   when each process last told anything; who told something after its lease had ended did not die.
    alive  process ids of replicas that run now, as text; empty: not known.
    """
    evidence = _evidence(spans, seen, alive)
    found: dict[tuple[str, str], list[tuple[Cause, _Case]]] = defaultdict(list)
    for case in _cases(spans):
        cause = cause_of(case.spans, evidence)
        if cause:
            found[cause.key].append((cause, case))
    groups = [_group(pairs) for pairs in found.values()]
    return sorted(groups, key=lambda group: (-group.count, group.cause.key))


def cause_in(spans: Sequence[Span], seen: Mapping[str, float], alive: Collection[str] = ()) -> Cause | None:
    """The root cause of one application's trouble, from its own trace alone; None where there was none."""
    return cause_of(spans, _evidence(spans, seen, alive))


def _evidence(spans: Sequence[Span], seen: Mapping[str, float], alive: Collection[str]) -> _Evidence:
    alone = _Evidence(_behind(spans), seen, alive)
    troubles = [
        (span.ended, cause)
        for span in spans
        if span.service == "intake"
        and (span.error or span.text(semconv.DB_OPERATION))
        and (cause := _service([span], alone) or _database([span], alone))
    ]
    return replace(alone, troubles=troubles)


def cause_of(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    """The first that applies, from the root to what follows of it."""
    for look in _LOOKS:
        if cause := look(spans, evidence):
            return cause
    return None


# --- The looks, in order ---


def _parked(spans: Sequence[Span], _: _Evidence) -> Cause | None:
    for span in spans:
        if span.text(semconv.OUTCOME) == "parked":
            stage, error = span.text(semconv.STAGE), span.text(semconv.EXCEPTION_TYPE)
            return Cause(
                "poisoned_application", f"intake -> {stage}", span.error,
                f"the application breaks stage {stage} at each attempt ({span.text(semconv.CAUSE)}, {error}) and is"
                " parked", "loanmesh parked list",
            )  # fmt: skip
    return None


def _database(spans: Sequence[Span], _: _Evidence) -> Cause | None:
    for span in spans:
        text = span.text(semconv.CAUSE)
        attempt = span.text(semconv.OUTCOME) == "failed" and span.error == "DependencyDown"
        call = span.text(semconv.REASON) == "DEPENDENCY_DOWN"
        if (attempt or call) and span.service == "intake" and "leaving" not in text:
            return _of_database(span.error, text)
    commits = [span.took_s for span in spans if span.text(semconv.DB_OPERATION)]
    if commits and max(commits) >= SLOW_S:
        text = f"the database is slow: a commit took {max(commits):.1f} s"
        return Cause("database_slow", "intake -> database", "slow", text, "loanmesh status")
    return None


def _of_database(status: str, text: str) -> Cause:
    if _FULL.search(text):
        return Cause("disk_full", "intake -> database", status, f"the database's disk is full: {text}", "df -h")
    if _BUSY.search(text):
        return Cause("database_slow", "intake -> database", status, f"the database is slow: {text}", "loanmesh status")
    return Cause("database_down", "intake -> database", status, f"the database is away: {text}", "loanmesh status")


def _lost(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    for span in spans:
        owner = span.text(semconv.OWNER)
        if span.error == "lease_ended":
            end = float(span.attributes.get(semconv.LEASE_END, span.ended))
            if evidence.seen.get(owner, 0.0) > end or _pid(owner) in evidence.alive:
                return _stood_still(owner)
            return Cause(
                "replica_died", f"intake ({owner})", "lease_ended",
                f"replica {owner} died with applications in hand; others took them over when its leases ended",
                "loanmesh status",
            )  # fmt: skip
    for span in spans:
        if span.error == "fence_lost":
            return _stood_still(span.text(semconv.OWNER))
    return None


def _pid(owner: str) -> str:
    """Of a process's name, service-pid-random."""
    return owner.rpartition("-")[0].rpartition("-")[2]


def _stood_still(owner: str) -> Cause:
    return Cause(
        "replica_paused", f"intake ({owner})", "lease_ended",
        f"replica {owner} stood still (paused, or cut off) for longer than its leases, and lives", "loanmesh status",
    )  # fmt: skip


def _service(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    for span in spans:
        callee = callee_of(span)
        if not callee or span.kind != "client" or not span.error or span.service != "intake":
            continue
        status, text = span.error, span.text(semconv.CAUSE)
        if status.endswith("_breaker_open"):
            status = evidence.behind.get(callee, "")
        return _of_service(callee, status or "breaker_open", text)
    return None


def _of_service(callee: str, status: str, text: str) -> Cause:
    hop, then = f"intake -> {callee}", "loanmesh deps"
    said = f": {text}" if text else ""
    match status:
        case "UNAVAILABLE" if _CERTIFICATE.search(text):
            return Cause(
                "bad_certificate", hop, status, f"the certificates of {hop} do not fit{said}", "loanmesh certs"
            )
        case "bad_certificate":
            return Cause(
                "bad_certificate", hop, status, f"the certificates of {hop} do not fit{said}", "loanmesh certs"
            )
        case "UNAUTHENTICATED" | "PERMISSION_DENIED":
            return Cause("not_allowed", hop, status, f"{callee} does not let intake in{said}", then)
        case "UNAVAILABLE":
            return Cause("service_down", hop, status, f"{callee} cannot be reached{said}", "loanmesh status")
        case "DEADLINE_EXCEEDED":
            return Cause("service_slow", hop, status, f"{callee} does not answer in time{said}", "loanmesh status")
        case "RESOURCE_EXHAUSTED":
            return Cause("service_overloaded", hop, status, f"{callee} is asked more than it can do{said}", then)
    return Cause("service_broken", hop, status, f"{callee} answers with {status}{said}", then)


_SOURCE_WORDS = {
    "unavailable": ("source_down", "is down"),
    "timeout": ("source_slow", "is slow: no answer in time"),
    "slow": ("source_slow", "is slow"),
    "overloaded": ("source_over_quota", "is asked more than its quota (429)"),
    "bulkhead_full": ("source_overloaded", "has more queries waiting than may wait"),
    "garbage": ("source_garbage", "answers nonsense"),
    "refused": ("source_refuses", "refuses our queries"),
    "breaker_open": ("source_breaker_open", "is left alone: its breaker is open"),
}


def _source(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    for span in spans:
        source = span.text(semconv.SOURCE)
        if not source or not span.name.startswith(("ask ", "skip ")):
            continue
        word = span.error or span.text(semconv.ERROR_TYPE)
        text = span.text(semconv.CAUSE)
        if word == "breaker_open":
            if "forced open" in text:
                return Cause("breaker_forced", f"bureau -> {source}", word, f"a person shut {source} off: {text}",
                             "loanmesh deps")  # fmt: skip
            word = evidence.behind.get(source) or ("timeout" if " took " in text else word)
        if not word and (span.took_s >= SLOW_S):
            word = "slow"
        if word in ("", "skipped") or word not in _SOURCE_WORDS:
            if word in ("", "skipped"):
                continue
            return _of_source(source, ("source_missing", f"is missing: {word}"), word)
        kind, said = _SOURCE_WORDS[word]
        why = f": {text}" if word == "breaker_open" and text else ""
        return _of_source(source, (kind, f"{said}{why}"), word)
    for span in spans:
        # Told by intake alone, where bureau's own telling is lost or sampled away.
        for part in span.text(semconv.WAITING_FOR).split(","):
            if part.startswith("source_missing:"):
                source = part.partition(":")[2]
                word = evidence.behind.get(source, "")
                return _of_source(source, _SOURCE_WORDS.get(word, ("source_missing", "is missing")), word or "missing")
    return None


def _of_source(source: str, said: tuple[str, str], word: str) -> Cause:
    kind, text = said
    return Cause(kind, f"bureau -> {source}", word, f"source {source} {text}", "loanmesh deps")


def _door(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    # Of a call that several shared, the door tells in one's trace: what each was answered, its own caller tells.
    at_door = [span for span in spans if span.kind == "server" and span.service == "intake"]
    refused = [span for span in spans if span.kind == "client" and span.service not in _INSIDE and span.error]
    for span in (*at_door, *refused):
        reason, text = span.text(semconv.REASON), span.text(semconv.CAUSE)
        if reason == "OVER_QUOTA":
            return Cause("budget_full", "caller -> intake", "RESOURCE_EXHAUSTED",
                         f"a caller's budget is used up: {text}", "loanmesh settings intake")  # fmt: skip
        if reason == "OVERLOADED":
            overload = Cause("overload", "caller -> intake", "RESOURCE_EXHAUSTED",
                             f"intake turns callers away: {text}", "loanmesh top")  # fmt: skip
            # Who stores slowly gets behind: that is no more than what the disk brought about. A caller's span lasts as
            # long as its patience, and tells of its last refusal.
            refused_at = span.began if span in at_door else span.ended
            return _meanwhile(evidence, refused_at - BEHIND_S, span.ended, _STORING) or overload
    return None


def _deadline(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    for span in spans:
        status = span.text(semconv.RPC_STATUS_CODE)
        at_door = span.kind == "server" and span.service == "intake" and span.error
        if status == "DEADLINE_EXCEEDED" and (at_door or (span.kind == "client" and span.service != "intake")):
            text = f"the caller's deadline passed before intake could answer (after {span.took_s * 1000:.0f} ms)"
            expired = Cause("deadline_expired", "caller -> intake", status, text, "loanmesh trace EXAMPLE")
            return _meanwhile(evidence, span.began, span.ended + BEHIND_S, _STORING) or expired
    for span in spans:
        status = span.text(semconv.RPC_STATUS_CODE)
        if span.kind == "client" and span.service not in _INSIDE and span.error and status == "UNAVAILABLE":
            return Cause("intake_down", "caller -> intake", status, "intake cannot be reached", "loanmesh status")
        if span.kind == "client" and span.service not in _INSIDE and span.error == "RESOURCE_EXHAUSTED":
            text = "the client library held calls back, since the mesh had turned others away"
            return Cause("caller_throttled", "caller", status, text, "loanmesh top")
        if span.kind == "server" and span.service == "intake" and status in ("INTERNAL", "UNKNOWN"):
            text = f"intake has a bug: {span.text(semconv.EXCEPTION_TYPE)}"
            return Cause("intake_broken", "caller -> intake", status, text, "loanmesh trace EXAMPLE")
    return None


def _queue(spans: Sequence[Span], evidence: _Evidence) -> Cause | None:
    late = [
        s
        for s in spans
        if s.service == "intake" and s.text(semconv.KEPT_FOR) in ("late", "deferred", "retried", "failed")
    ]
    if not late:
        return None
    longest = max(late, key=_waited_s)
    if _waited_s(longest) >= SLOW_S:
        # While a service is known to be down nothing is begun: who waited then waited for it, not for a turn.
        text = "more came than could be decided: they waited for their turn"
        backlog = Cause("backlog", "intake", "late", text, "loanmesh top")
        return _meanwhile(evidence, longest.began - _waited_s(longest), longest.began) or backlog
    words = Counter(word for s in late if (word := s.error or s.text(semconv.ERROR_TYPE)))
    word = words.most_common(1)[0][0] if words else "late"
    return Cause("other", "intake", word, f"intake could not decide: {word}", "loanmesh trace EXAMPLE")


def _meanwhile(evidence: _Evidence, began: float, ended: float, kinds: str = "") -> Cause | None:
    """What failed most between two times, of services and the database; of kinds that match, where some are given."""
    found = [cause for at, cause in evidence.troubles if began <= at <= ended and re.match(kinds, cause.kind)]
    most = Counter(cause.key for cause in found).most_common(1)
    return next(cause for cause in found if cause.key == most[0][0]) if most else None


def _waited_s(span: Span) -> float:
    return float(span.attributes.get(semconv.WAITED_MS, 0)) / 1000


_STORING = "database_|disk_"
BEHIND_S = 3.0
"""How long after a trouble its queue still stands."""
_INSIDE = ("intake", "bureau", "scoring", "pricing")
_LOOKS: tuple[Callable[[Sequence[Span], _Evidence], Cause | None], ...] = (
    _parked, _database, _lost, _service, _source, _door, _deadline, _queue,
)  # fmt: skip


# --- What belongs together ---


def _cases(spans: Sequence[Span]) -> Iterator[_Case]:
    """By application; spans of a trace that name none go to each of its applications, or are a case of their own."""
    by_trace: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_trace[span.trace_id].append(span)
    for trace_id, inside in by_trace.items():
        shared = [span for span in inside if not span.application]
        cases: dict[str, _Case] = {}
        for span in inside:
            if span.application:
                cases.setdefault(span.application, _Case(span.application)).spans.append(span)
        if cases:
            for case in cases.values():
                case.spans += shared
                yield case
        elif any(span.name.endswith("SubmitApplication") or "SubmitApplications" in span.name for span in shared):
            yield _Case(trace_id, shared)


def _behind(spans: Sequence[Span]) -> dict[str, str]:
    """What failed most, per source or service, other than by an open breaker."""
    failed: dict[str, Counter[str]] = defaultdict(Counter)
    for span in spans:
        if span.name.startswith("ask ") and span.error not in ("", "breaker_open"):
            failed[span.text(semconv.SOURCE)][span.error] += 1
        elif span.kind == "client" and span.error and (callee := callee_of(span)):
            bad = span.error == "UNAVAILABLE" and _CERTIFICATE.search(span.text(semconv.CAUSE))
            if not span.error.endswith("_breaker_open"):
                failed[callee]["bad_certificate" if bad else span.error] += 1
    return {name: counts.most_common(1)[0][0] for name, counts in failed.items()}


def callee_of(span: Span) -> str:
    """Which service a call went to; '' where it went to none of those behind intake."""
    return _SERVICES.get(span.text(semconv.RPC_METHOD), "")


_UNDECIDED = frozenset({"", "failed", "lost", "deferred", "parked"})
"""Outcomes of attempts after which their application still waits for us."""


def decided_in(spans: Sequence[Span]) -> Span | None:
    """The last attempt at one application, where it led to a decision, or to a question to the applicant."""
    attempts = [span for span in spans if span.service == "intake" and span.text(semconv.OUTCOME)]
    last = max(attempts, key=lambda span: span.ended, default=None)
    return last if last and last.text(semconv.OUTCOME) not in _UNDECIDED else None


def _group(pairs: Sequence[tuple[Cause, _Case]]) -> Group:
    newest_cause, newest = max(pairs, key=lambda pair: max(span.ended for span in pair[1].spans))
    every = [span for _, case in pairs for span in case.spans]
    breakers = [span for span in every if "breaker_open" in span.error]
    stored = [case.spans for _, case in pairs if any(span.application for span in case.spans)]
    decided = [span.ended for spans in stored if (span := decided_in(spans))]
    return Group(
        cause=newest_cause,
        count=len(pairs),
        example=newest.id,
        breaker=max(breakers, key=lambda span: span.ended).text(semconv.CAUSE) if breakers else "",
        first_at=min(span.began for span in every),
        last_at=max(span.ended for span in every),
        undecided=len(stored) - len(decided),
        decided_at=max(decided, default=None),
    )
