"""Many sources for many subjects, in parallel, within a budget. A source that does not answer is a value, no error."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.breaker import Breaker, Permit, State
from loanmesh.runtime.clock import Clock
from services.bureau.consent import has_consent
from services.bureau.freshness import is_fresh, is_usable
from services.bureau.profile import Answer, Missing, report
from services.bureau.sources import PartyKind, Source

SOURCE_FAULTS = frozenset({"timeout", "unavailable", "garbage"})
"""Words of the wire that speak against the source. Others (`refused`, `overloaded`) say nothing of its health."""
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

    subject_hash  keyed hash of an identity number: the cache holds no numbers.
    breakers      one a source; a source without one is always asked.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        wire: Wire,
        cache: Cache,
        clock: Clock,
        subject_hash: Callable[[str], str],
        *,
        budget_s: float,
        at_once_max: int,
        waiting_max: int,
        retry_s: float,
        breakers: Mapping[str, Breaker] | None = None,
    ) -> None:
        self._sources = sources
        self._wire = wire
        self._cache = cache
        self._clock = clock
        self._hash = subject_hash
        self._budget_s = budget_s
        self._waiting_max = waiting_max
        self._retry_s = retry_s
        self._breakers = breakers or {}
        self._bulkheads = {source: asyncio.Semaphore(at_once_max) for source in sources}
        self._held: Counter[str] = Counter()
        self._query_ended = {source: asyncio.Event() for source in sources}
        self._under_way: dict[Key, asyncio.Task[Answer | Missing]] = {}

    async def gather(self, items: Sequence[GatherProfilesRequest.Item]) -> list[CreditProfile]:
        """One profile an item, in order, within the budget."""
        now = self._clock.now()
        wanted = [self._wanted(item, now) for item in items]
        cached = await self._cache.get([key for keys in wanted for key in keys])
        now_s = now.timestamp()
        tasks: dict[Key, asyncio.Task[Answer | Missing]] = {}
        for item, keys in zip(items, wanted, strict=True):
            for key in keys:
                if key not in cached or not is_fresh(cached[key].observed_at, self._sources[key[2]], now_s):
                    tasks[key] = self._fetch(key, _subject(item.party))
        if tasks:
            await asyncio.wait(tasks.values(), timeout=self._budget_s)
        return [self._profile(item, keys, cached, tasks) for item, keys in zip(items, wanted, strict=True)]

    async def close(self) -> None:
        """Give up the queries under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _wanted(self, item: GatherProfilesRequest.Item, now: dt.datetime) -> list[Key]:
        subject = self._hash(item.party.identity.value)
        return [
            (item.lender, subject, source)
            for source in self._sources
            if has_consent(item.consents, item.party, source, now)
        ]

    def _fetch(self, key: Key, subject: Subject) -> asyncio.Task[Answer | Missing]:
        if key not in self._under_way:
            task = asyncio.create_task(self._ask(key, subject))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return self._under_way[key]

    async def _ask(self, key: Key, subject: Subject) -> Answer | Missing:
        source = self._sources[key[2]]
        breaker = self._breakers.get(source.id)
        if breaker and breaker.state is State.OPEN and breaker.refuses:
            return self._missing("breaker_open", breaker.retry_in_s)
        if self._held[source.id] >= self._waiting_max:
            return self._missing("bulkhead_full")
        self._held[source.id] += 1
        try:
            async with self._bulkheads[source.id]:
                answer = await self._ask_within_breaker(source, breaker, subject)
        finally:
            self._held[source.id] -= 1
        if isinstance(answer, Answer):
            await self._cache.put(key, answer)
        return answer

    async def _ask_within_breaker(self, source: Source, breaker: Breaker | None, subject: Subject) -> Answer | Missing:
        # Only now, behind the bulkhead: the breaker may have opened meanwhile, and waiting must hold no permit.
        permit = await self._permit(source, breaker) if breaker else None
        if breaker and permit is None:
            return self._missing("breaker_open", breaker.retry_in_s)
        try:
            said = await self._wire.ask(source, subject)
            if permit and isinstance(said, Answer):
                permit.succeed()
            elif permit and said in SOURCE_FAULTS:
                permit.fail()
        finally:
            if permit:
                permit.release()
                # Wakes who waits now, and only those.
                self._query_ended[source.id].set()
                self._query_ended[source.id].clear()
        return said if isinstance(said, Answer) else self._missing(said)

    async def _permit(self, source: Source, breaker: Breaker) -> Permit | None:
        """Leave to ask. While probes are under way their verdict is near: waiting for it saves a whole new look."""
        while (permit := breaker.try_acquire()) is None and breaker.state is State.HALF_OPEN:
            await self._query_ended[source.id].wait()
        return permit

    def _missing(self, cause: str, retry_in_s: float = 0.0) -> Missing:
        return Missing(cause, self._clock.now().timestamp() + max(self._retry_s, retry_in_s))

    def _profile(
        self,
        item: GatherProfilesRequest.Item,
        keys: Sequence[Key],
        cached: Mapping[Key, Answer],
        tasks: Mapping[Key, asyncio.Task[Answer | Missing]],
    ) -> CreditProfile:
        now = self._clock.now()
        by_source = {key[2]: key for key in keys}
        profile = CreditProfile()
        profile.gather_time.FromDatetime(now)
        for source in self._sources.values():
            key = by_source.get(source.id)
            said = None if key is None else self._said(key, source, cached, tasks, now.timestamp())
            profile.reports.append(report(source, said, now.timestamp()))
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
        if task is None:
            return cached[key]
        fetched = self._missing("timeout") if not task.done() else self._outcome(task)
        if isinstance(fetched, Missing) and key in cached and is_usable(cached[key].observed_at, source, now_s):
            return cached[key]
        return fetched

    def _outcome(self, task: asyncio.Task[Answer | Missing]) -> Answer | Missing:
        if task.cancelled():
            return self._missing("shutdown")
        if error := task.exception():
            # A bug of ours must cost this one fact, not the whole batch it travels in.
            log.error("query_failed", error_type=type(error).__name__, exc_info=error)
            return self._missing("fault")
        return task.result()


def _subject(party: Party) -> Subject:
    kind = Identity.Kind.Name(party.identity.kind).removeprefix("KIND_").lower()
    return Subject("person" if party.kind == Party.KIND_PERSON else "firm", kind, party.identity.value)
