"""Whether what was seen of the mesh can be true: the promises as rules over a history.

Pure: history in, violations out. The rules know nothing of how the mesh works, only what it promises.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lab.history import FINAL, PARKED, SRE, AcceptAsked, Accepted, Acknowledged, Decided, Read, Record, Standing, Told

SOURCES = ("central_bank", "tax", "registry", "court", "bank_flow")
OPEN = frozenset({"PENDING", "AWAITING_INFORMATION", "IN_REVIEW"})
_AFTER = {"DECIDED": FINAL, "OFFER_ACCEPTED": {"OFFER_ACCEPTED"}, "WITHDRAWN": {"WITHDRAWN"}, "EXPIRED": {"EXPIRED"}}
"""Which states may follow a final one; any may follow an open one."""
_COMPLETE = frozenset({"FRESH", "NOT_FOUND"})


@dataclass(frozen=True)
class Violation:
    """A promise that did not hold: for which application, and the records (mostly two) that contradict each other."""

    rule: str
    application: str
    text: str
    records: tuple[Record, ...]

    def __str__(self) -> str:
        return "\n    ".join([f"{self.rule}: {self.application}: {self.text}", *map(str, self.records)])


History = Sequence[Record]
R = TypeVar("R", bound=Record)


def check(history: History, sources: Collection[str] = SOURCES) -> list[Violation]:
    """All violations of all rules; empty where everything promised was kept.

    sources  which sources complete evidence has to come from.
    """
    found = [violation for rule in RULES for violation in rule(history)]
    return found + declines_rest_on_evidence(history, sources)


def nothing_is_lost(history: History) -> list[Violation]:
    """Each acknowledged application is decided in the end, or open with an owner or a time."""
    last = {standing.name: standing for standing in _all(history, Standing)}
    found = []
    for first in _first_of_each(_all(history, Acknowledged), lambda record: record.name):
        end = last.get(first.name)
        if end is None:
            found.append(Violation("nothing_is_lost", first.name, "acknowledged, and not there at the end", (first,)))
        elif end.state not in FINAL and (
            end.state not in OPEN or (not end.owner and end.due_at is None and end.estimate_at is None)
        ):
            text = f"acknowledged, and {end.state} at the end with neither owner nor time"
            found.append(Violation("nothing_is_lost", first.name, text, (first, end)))
    return found


def decided_once(history: History) -> list[Violation]:
    """One assessment has one decision, and its history tells of one."""
    found = []
    seen: dict[tuple[str, int], Decided] = {}
    for decided in _all(history, Decided):
        first = seen.setdefault((decided.name, decided.assessment), decided)
        if first.digest != decided.digest:
            text = f"assessment {decided.assessment} has two decisions"
            found.append(Violation("decided_once", decided.name, text, (first, decided)))
    for told in _all(history, Told):
        assessments = [event.assessment for event in told.events if event.kind == "decided"]
        if len(assessments) != len(set(assessments)):
            text = f"decided {len(assessments)} times, in assessments {', '.join(assessments)}"
            found.append(Violation("decided_once", told.name, text, (told,)))
    return found


def readers_agree(history: History) -> list[Violation]:
    """Whoever is shown the same revision is shown the same state, decision and accepted offer."""
    found = []
    seen: dict[tuple[str, int], Read | Standing] = {}
    for read in history:
        if not isinstance(read, Read | Standing):
            continue
        first = seen.setdefault((read.name, read.revision), read)
        shown = [(r.state, r.assessment, r.digest, r.accepted_offer) for r in (first, read)]
        if shown[0] != shown[1]:
            text = f"revision {read.revision} was shown in two ways"
            found.append(Violation("readers_agree", read.name, text, (first, read)))
    return found


def readers_go_forward(history: History) -> list[Violation]:
    """No reader is shown an older revision than before, nor a state that cannot follow the one before."""
    found = []
    seen: dict[tuple[str, str], Read] = {}
    for read in _all(history, Read):
        before = seen.get((read.reader, read.name))
        seen[read.reader, read.name] = read
        if before is None:
            continue
        if read.revision < before.revision:
            text = f"{read.reader} was shown revision {read.revision} after {before.revision}"
            found.append(Violation("readers_go_forward", read.name, text, (before, read)))
        elif read.state not in _AFTER.get(before.state, OPEN | FINAL):
            text = f"{read.reader} was shown {read.state} after {before.state}"
            found.append(Violation("readers_go_forward", read.name, text, (before, read)))
    return found


def requests_keep_their_name(history: History) -> list[Violation]:
    """One request_id of a client is one application, however often it is sent, and nobody else's."""
    found = []
    name_of: dict[tuple[str, str], Acknowledged] = {}
    request_of: dict[str, Acknowledged] = {}
    for answer in _all(history, Acknowledged):
        first = name_of.setdefault((answer.client, answer.request_id), answer)
        if first.name != answer.name:
            text = f"request {answer.request_id} of {answer.client} is {first.name} as well"
            found.append(Violation("requests_keep_their_name", answer.name, text, (first, answer)))
        other = request_of.setdefault(answer.name, answer)
        if (other.client, other.request_id) != (answer.client, answer.request_id):
            text = "answered to two requests"
            found.append(Violation("requests_keep_their_name", answer.name, text, (other, answer)))
    return found


def acceptances_add_up(history: History) -> list[Violation]:
    """An accepted offer is one of the decision's, asked for, the only one, and still accepted at the end."""
    rule = "acceptances_add_up"
    found = []
    decided = {record.name: record for record in _all(history, Decided)}
    asked = {(record.name, record.offer_id) for record in _all(history, AcceptAsked)}
    ends = {record.name: record for record in _all(history, Standing)}
    first: dict[str, Accepted] = {}
    for accepted in _all(history, Accepted):
        before = first.setdefault(accepted.name, accepted)
        if before.offer_id != accepted.offer_id:
            text = f"both {before.offer_id} and {accepted.offer_id} were accepted"
            found.append(Violation(rule, accepted.name, text, (before, accepted)))
    for name, accepted in first.items():
        end = ends.get(name)
        if end and end.accepted_offer != accepted.offer_id:
            text = f"{accepted.offer_id} was accepted, and {end.accepted_offer or 'none'} is at the end"
            found.append(Violation(rule, name, text, (accepted, end)))
    for shown in history:
        if not isinstance(shown, Read | Standing) or not shown.accepted_offer:
            continue
        decision = decided.get(shown.name)
        if decision is None or shown.accepted_offer not in {offer.id for offer in decision.offers}:
            text = f"{shown.accepted_offer} is none of the decision's offers"
            found.append(Violation(rule, shown.name, text, (*([decision] if decision else ()), shown)))
        elif (shown.name, shown.accepted_offer) not in asked:
            text = f"{shown.accepted_offer} is accepted, and nobody asked for it"
            found.append(Violation(rule, shown.name, text, (decision, shown)))
    return found + _sums_differ(history)


def _sums_differ(history: History) -> list[Violation]:
    """Money: what clients were told they owe is what the mesh has on record, over the whole run."""
    principal = {(r.name, o.id): o.principal_fen for r in _all(history, Decided) for o in r.offers}
    ends = _all(history, Standing)
    told = {r.name: principal.get((r.name, r.offer_id), 0) for r in _all(history, Accepted)}
    recorded = {r.name: principal.get((r.name, r.accepted_offer), 0) for r in ends if r.accepted_offer}
    # An acceptance whose answer was lost is on record and was told to nobody; both are right.
    unanswered = {r.name for r in _all(history, AcceptAsked)} - told.keys()
    on_record = sum(fen for name, fen in recorded.items() if name not in unanswered)
    if not ends or sum(told.values()) == on_record:
        return []
    text = f"clients were told of {sum(told.values())} fen accepted, and {on_record} fen are on record"
    differing = sorted(name for name in told.keys() | recorded.keys() if told.get(name) != recorded.get(name))
    records = [r for r in history if isinstance(r, Accepted | Standing) and r.name in differing[:1]]
    return [Violation("acceptances_add_up", ", ".join(differing[:1]), text, tuple(records))]


def events_hold(history: History) -> list[Violation]:
    """An application's own history starts with its acceptance, has no gap, and its chain of hashes holds.

    It tells as many events as the newest revision that anybody was shown.
    """
    found = []
    newest: dict[str, Read] = {}
    for read in history:
        if isinstance(read, Read):
            before = newest.get(read.name)
            newest[read.name] = read if before is None or read.revision > before.revision else before
        elif isinstance(read, Told):
            numbers = [event.seq for event in read.events]
            if not read.chain_intact:
                found.append(Violation("events_hold", read.name, "the chain of hashes is broken", (read,)))
            elif numbers != list(range(1, len(numbers) + 1)) or not numbers or read.events[0].kind != "accepted":
                text = f"events are {', '.join(f'{e.seq} {e.kind}' for e in read.events) or 'none'}"
                found.append(Violation("events_hold", read.name, text, (read,)))
            elif (shown := newest.get(read.name)) and shown.revision > len(numbers):
                text = f"revision {shown.revision} was shown, and there are {len(numbers)} events"
                found.append(Violation("events_hold", read.name, text, (shown, read)))
    return found


def parked_rests(history: History) -> list[Violation]:
    """What is parked stays so until it is released or withdrawn; and who owns it by being parked tells of it.

    Only what was parked is released, and a parked one has a time by which somebody looks.
    """
    rule = "parked_rests"
    found = []
    last: dict[str, Told] = {}
    for told in _all(history, Told):
        last[told.name] = told
        for event, after in zip(told.events, told.events[1:], strict=False):
            if event.kind == PARKED and after.kind not in ("released", "withdrawn", "erased"):
                found.append(Violation(rule, told.name, f"{after.kind} while it was parked", (told,)))
            if after.kind == "released" and event.kind != PARKED:
                found.append(Violation(rule, told.name, f"released after {event.kind}", (told,)))
    for end in _all(history, Standing):
        if end.owner != SRE:
            continue
        if end.due_at is None:
            found.append(Violation(rule, end.name, "parked, and nobody said by when somebody looks", (end,)))
        known = last.get(end.name)
        if known and known.events and known.events[-1].kind != PARKED:
            text = f"waits for the SRE, and the newest event is {known.events[-1].kind}"
            found.append(Violation(rule, end.name, text, (known, end)))
    return found


def declines_rest_on_evidence(history: History, sources: Collection[str] = SOURCES) -> list[Violation]:
    """Each decline cites an answer from every source, each in date at the moment of the decision.

    A decline that nobody had explained cannot be judged, and so is a violation: explain every one.
    """
    rule = "declines_rest_on_evidence"
    found = []
    explained = {(r.name, r.assessment) for r in _all(history, Decided) if r.reports}
    for decided in _all(history, Decided):
        if decided.outcome != "DECLINED":
            continue
        if (decided.name, decided.assessment) not in explained:
            found.append(Violation(rule, decided.name, "declined, and never explained", (decided,)))
        elif decided.reports and (gaps := list(_gaps(decided, sources))):
            found.append(Violation(rule, decided.name, f"declined with {', '.join(gaps)}", (decided,)))
    return found


def _gaps(decided: Decided, sources: Collection[str]) -> Iterator[str]:
    reports = {report.source: report for report in decided.reports}
    for source in dict.fromkeys([*sources, *reports]):
        report = reports.get(source)
        if report is None:
            yield f"no word of {source}"
        elif report.state not in _COMPLETE:
            yield f"{source} {report.state}"
        elif report.usable_until is None or report.usable_until <= decided.decided_at:
            yield f"{source} out of date"


RULES: tuple[Callable[[History], list[Violation]], ...] = (
    nothing_is_lost,
    decided_once,
    readers_agree,
    readers_go_forward,
    requests_keep_their_name,
    acceptances_add_up,
    events_hold,
    parked_rests,
)
"""All but `declines_rest_on_evidence`, which needs to know the sources."""


def by_rule(violations: Iterable[Violation]) -> dict[str, list[Violation]]:
    """The violations under the rules they break."""
    found: dict[str, list[Violation]] = defaultdict(list)
    for violation in violations:
        found[violation.rule].append(violation)
    return dict(found)


def _all(history: History, kind: type[R]) -> list[R]:
    return [record for record in history if isinstance(record, kind)]


def _first_of_each(records: Iterable[R], key: Callable[[R], str]) -> list[R]:
    first: dict[str, R] = {}
    for record in records:
        first.setdefault(key(record), record)
    return list(first.values())
