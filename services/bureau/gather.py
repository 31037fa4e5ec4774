"""Many sources for many subjects, in parallel, within a budget. A source that does not answer is a value, no error."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest, SourceReport
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.consent import consented
from loanmesh.runtime.guard import Guard, Refused, Verdict
from loanmesh.runtime.vitals import SourceFigures
from services.bureau.brownout import Brownout
from services.bureau.freshness import is_fresh, is_usable
from services.bureau.profile import Answer, Missing, report
from services.bureau.sources import PartyKind, Source
from services.bureau.trail import Follow, Trail, current

_VERDICTS = {
    "timeout": Verdict.ILL, "unavailable": Verdict.ILL, "garbage": Verdict.ILL, "overloaded": Verdict.BUSY,
}  # fmt: skip
"""What words of the wire say of the source; others, as `refused`, say nothing of its health."""
_STATES = {
    number: name.removeprefix("STATE_").lower() for name, number in SourceReport.State.items()
}  # fmt: skip
"""Words for the states of a report, as metrics have them."""
_IDENTITY_KINDS = {number: name.removeprefix("KIND_").lower() for name, number in Identity.Kind.items()}
log = structlog.get_logger()
Key = tuple[str, str, str]
"""(lender, hash of the subject, source)."""


@dataclass(frozen=True)
class Subject:
    """Whom to ask about. The number is personal data and goes to the source only."""

    kind: PartyKind
    identity_kind: str
    number: str


class Wire(Protocol):
    """The way to the sources."""

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        """The source's answer, or why there is none as a stable word. Never raises."""
        ...


class Cache(Protocol):
    """What sources said before."""

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]: ...
    async def put(self, key: Key, answer: Answer) -> None: ...


class Gatherer:
    """Gathers profiles. Two askers of the same fact share one query, also across calls.

    subject_hash  keyed hash of (lender, identity number): the cache holds no numbers.
    guards        one a source.
    brownouts     what is left out while a source is overloaded; a source without one is always asked.
    follow        told of each batch when it is gathered.
    figures       one a source: what became of asking it.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        wire: Wire,
        cache: Cache,
        clock: Clock,
        subject_hash: Callable[[str, str], str],
        *,
        guards: Mapping[str, Guard],
        budget_s: float,
        retry_s: float,
        brownouts: Mapping[str, Brownout] | None = None,
        follow: Follow | None = None,
        figures: Mapping[str, SourceFigures] | None = None,
    ) -> None:
        self._sources = sources
        self._wire = wire
        self._cache = cache
        self._clock = clock
        self._hash = subject_hash
        self._guards = guards
        self._budget_s = budget_s
        self._retry_s = retry_s
        self._brownouts = brownouts or {}
        self._follow = follow
        self.figures = figures or {source: SourceFigures() for source in sources}
        self._under_way: dict[Key, asyncio.Task[Answer | Missing]] = {}
        self._trails: dict[Key, Trail] = {}

    async def gather(self, items: Sequence[GatherProfilesRequest.Item]) -> list[CreditProfile]:
        """One profile an item, in order, within the budget."""
        began = self._clock.monotonic()
        now = self._clock.now()
        wanted = [self._wanted(item, now) for item in items]
        cached = await self._cache.get([key for keys in wanted for key in keys])
        now_s = now.timestamp()
        tasks: dict[Key, asyncio.Task[Answer | Missing]] = {}
        spared: dict[Key, str] = {}
        for item, keys in zip(items, wanted, strict=True):
            subject = _subject(item.party)
            for key in keys:
                if key in cached and is_fresh(cached[key].observed_at, self._sources[key[2]], now_s):
                    continue
                if step := self._step(key, cached, now_s):
                    spared[key] = step
                else:
                    tasks[key] = self._fetch(key, subject)
        trails = {key: self._trails[key] for key in tasks}
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self._budget_s)
        gathered_at = Timestamp()
        gathered_at.FromDatetime(ended := self._clock.now())
        reports = [self._reports(keys, cached, tasks, spared, ended.timestamp()) for keys in wanted]
        profiles = [_profile(each, gathered_at) for each in reports]
        if self._follow:
            try:
                self._follow(
                    items, profiles, [[trails[key] for key in keys if key in trails] for keys in wanted], began
                )
            except Exception as error:  # What cannot be told must not cost a profile.
                log.error("not_traced", error_type=type(error).__name__, exc_info=error)
        return profiles

    async def close(self) -> None:
        """Give up the queries under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, item: GatherProfilesRequest.Item, now: dt.datetime) -> list[Key]:
        subject = self._hash(item.lender, item.party.identity.value)
        may_ask = consented(item.consents, item.party, now)
        return [(item.lender, subject, source) for source in self._sources if source in may_ask]

    def _step(self, key: Key, cached: Mapping[Key, Answer], now_s: float) -> str:
        """The degradation step because of which the source is not asked; empty: ask.

        A query under way is not waited for either: under overload it stands in a long queue, and its answer will be
        in the cache for the next look.
        """
        brownout = self._brownouts.get(key[2])
        if brownout is None:
            return ""
        usable = key in cached and is_usable(cached[key].observed_at, self._sources[key[2]], now_s)
        return brownout.step(usable)

    def _fetch(self, key: Key, subject: Subject) -> asyncio.Task[Answer | Missing]:
        if key not in self._under_way:
            trail = self._trails[key] = Trail(key[2], self._clock.monotonic())
            task = asyncio.create_task(self._ask(key, subject, trail))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._ended(key))
        return self._under_way[key]

    def _ended(self, key: Key) -> None:
        del self._under_way[key], self._trails[key]

    async def _ask(self, key: Key, subject: Subject, trail: Trail) -> Answer | Missing:
        source, guard = self._sources[key[2]], self._guards[key[2]]
        current.set(trail)
        try:
            said = await guard.call(lambda: self._wire.ask(source, subject), _verdict)
        except Refused as refused:
            trail.cause = refused.cause
            trail.detail = guard.breaker.cause if refused.cause == "breaker_open" else ""
            return self._missing(refused.cause, refused.retry_s)
        finally:
            trail.ended = self._clock.monotonic()
        if not isinstance(said, Answer):
            trail.cause = said
            return self._missing(said)
        self.figures[source.id].answered += 1
        await self._cache.put(key, said)
        return said

    def _missing(self, cause: str, retry_in_s: float = 0.0) -> Missing:
        return Missing(cause, self._clock.now().timestamp() + max(self._retry_s, retry_in_s))

    def _reports(
        self,
        keys: Sequence[Key],
        cached: Mapping[Key, Answer],
        tasks: Mapping[Key, asyncio.Task[Answer | Missing]],
        spared: Mapping[Key, str],
        now_s: float,
    ) -> list[SourceReport]:
        by_source = {key[2]: key for key in keys}
        reports = []
        for source in self._sources.values():
            key = by_source.get(source.id)
            said = None if key is None else self._said(key, source, cached, tasks, now_s)
            made = report(source, said, now_s, spared.get(key, "") if key else "")
            figures = self.figures[source.id]
            figures.reports[_STATES[made.state]] += 1
            if isinstance(said, Answer):
                figures.used(said.observed_at)
            reports.append(made)
        return reports

    def _said(
        self,
        key: Key,
        source: Source,
        cached: Mapping[Key, Answer],
        tasks: Mapping[Key, asyncio.Task[Answer | Missing]],
        now_s: float,
    ) -> Answer | Missing:
        fetched = self._outcome(tasks[key]) if key in tasks else None
        known = cached.get(key)
        if isinstance(fetched, Answer):
            # A source may lag behind itself, or behind the limit for use: what it says now is not new by being said.
            newest = fetched if known is None or known.observed_at <= fetched.observed_at else known
            return newest if is_usable(newest.observed_at, source, now_s) else self._missing("outdated")
        if known and is_usable(known.observed_at, source, now_s):
            return known
        return fetched or self._missing("skipped")

    def _outcome(self, task: asyncio.Task[Answer | Missing]) -> Answer | Missing:
        if not task.done():
            return self._missing("timeout")
        if task.cancelled():
            return self._missing("shutdown")
        if error := task.exception():
            # A bug of ours must cost this one fact, not the whole batch it travels in.
            log.error("query_failed", error_type=type(error).__name__, exc_info=error)
            return self._missing("fault")
        return task.result()


def _verdict(said: Answer | str) -> Verdict:
    return Verdict.WELL if isinstance(said, Answer) else _VERDICTS.get(said, Verdict.NONE)


def _profile(reports: Iterable[SourceReport], gathered_at: Timestamp) -> CreditProfile:
    profile = CreditProfile()
    # In place: a message given to another's constructor is written and read once more.
    for one in reports:
        profile.reports.add().CopyFrom(one)
    profile.gather_time.CopyFrom(gathered_at)
    return profile


def _subject(party: Party) -> Subject:
    kind: PartyKind = "person" if party.kind == Party.KIND_PERSON else "firm"
    return Subject(kind, _IDENTITY_KINDS[party.identity.kind], party.identity.value)
