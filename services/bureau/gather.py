"""Many sources for many subjects, in parallel, within a budget. A source that does not answer is a value, no error."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest, SourceReport
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.consent import has_consent
from loanmesh.runtime.guard import Guard, Refused, Verdict
from loanmesh.runtime.vitals import SourceFigures
from services.bureau.brownout import Brownout
from services.bureau.freshness import is_fresh, is_usable
from services.bureau.profile import Answer, Missing, report
from services.bureau.sources import PartyKind, Source

_VERDICTS = {
    "timeout": Verdict.ILL, "unavailable": Verdict.ILL, "garbage": Verdict.ILL, "overloaded": Verdict.BUSY,
}  # fmt: skip
"""What words of the wire say of the source; others, as `refused`, say nothing of its health."""
_STATES = {
    number: name.removeprefix("STATE_").lower() for name, number in SourceReport.State.items()
}  # fmt: skip
"""Words for the states of a report, as metrics have them."""
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
        self.figures = figures or {source: SourceFigures() for source in sources}
        self._under_way: dict[Key, asyncio.Task[Answer | Missing]] = {}

    async def gather(self, items: Sequence[GatherProfilesRequest.Item]) -> list[CreditProfile]:
        """One profile an item, in order, within the budget."""
        now = self._clock.now()
        wanted = [self._wanted(item, now) for item in items]
        cached = await self._cache.get([key for keys in wanted for key in keys])
        now_s = now.timestamp()
        tasks: dict[Key, asyncio.Task[Answer | Missing]] = {}
        spared: dict[Key, str] = {}
        for item, keys in zip(items, wanted, strict=True):
            for key in keys:
                if key in cached and is_fresh(cached[key].observed_at, self._sources[key[2]], now_s):
                    continue
                if step := self._step(key, cached, now_s):
                    spared[key] = step
                else:
                    tasks[key] = self._fetch(key, _subject(item.party))
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self._budget_s)
        return [self._profile(item, keys, cached, tasks, spared) for item, keys in zip(items, wanted, strict=True)]

    async def close(self) -> None:
        """Give up the queries under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, item: GatherProfilesRequest.Item, now: dt.datetime) -> list[Key]:
        subject = self._hash(item.lender, item.party.identity.value)
        return [
            (item.lender, subject, source)
            for source in self._sources
            if has_consent(item.consents, item.party, source, now)
        ]

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
            task = asyncio.create_task(self._ask(key, subject))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return self._under_way[key]

    async def _ask(self, key: Key, subject: Subject) -> Answer | Missing:
        source = self._sources[key[2]]
        try:
            said = await self._guards[source.id].call(lambda: self._wire.ask(source, subject), _verdict)
        except Refused as refused:
            return self._missing(refused.cause, refused.retry_s)
        if not isinstance(said, Answer):
            return self._missing(said)
        self.figures[source.id].answered += 1
        await self._cache.put(key, said)
        return said

    def _missing(self, cause: str, retry_in_s: float = 0.0) -> Missing:
        return Missing(cause, self._clock.now().timestamp() + max(self._retry_s, retry_in_s))

    def _profile(
        self,
        item: GatherProfilesRequest.Item,
        keys: Sequence[Key],
        cached: Mapping[Key, Answer],
        tasks: Mapping[Key, asyncio.Task[Answer | Missing]],
        spared: Mapping[Key, str],
    ) -> CreditProfile:
        now = self._clock.now()
        by_source = {key[2]: key for key in keys}
        profile = CreditProfile()
        profile.gather_time.FromDatetime(now)
        for source in self._sources.values():
            key = by_source.get(source.id)
            said = None if key is None else self._said(key, source, cached, tasks, now.timestamp())
            made = report(source, said, now.timestamp(), spared.get(key, "") if key else "")
            figures = self.figures[source.id]
            figures.reports[_STATES[made.state]] += 1
            if isinstance(said, Answer):
                figures.used(said.observed_at)
            profile.reports.append(made)
        return profile

    def _said(
        self,
        key: Key,
        source: Source,
        cached: Mapping[Key, Answer],
        tasks: Mapping[Key, asyncio.Task[Answer | Missing]],
        now_s: float,
    ) -> Answer | Missing:
        task = tasks.get(key)
        fetched = self._outcome(task) if task else self._missing("skipped")
        if isinstance(fetched, Missing) and key in cached and is_usable(cached[key].observed_at, source, now_s):
            return cached[key]
        return fetched

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


def _subject(party: Party) -> Subject:
    kind = Identity.Kind.Name(party.identity.kind).removeprefix("KIND_").lower()
    return Subject("person" if party.kind == Party.KIND_PERSON else "firm", kind, party.identity.value)
