"""The sources of evidence, and what can be wrong with them. HttpWire's timeout and retries are the real ones."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import aiohttp

from lab.population import SOURCES, Kind, Population
from lab.simulator.loop import VirtualLoop
from lab.simulator.network import Observer
from loanmesh.runtime.breaker import Breaker, State
from loanmesh.runtime.clock import Clock
from services.bureau.gather import Subject
from services.bureau.profile import Answer
from services.bureau.sources import Garbage, Source
from services.bureau.wire import HttpWire

Mood = Literal["well", "slow", "erring", "hanging", "garbage", "overloaded", "dead"]
PEOPLE = 24
"""Subjects a run draws from; few, so that facts are looked up, not drawn anew, in each of thousands of runs."""


@lru_cache(maxsize=1)
def population() -> Population:
    """The same for every run."""
    return Population(seed=1)


@lru_cache(maxsize=1)
def facts_of() -> Mapping[str, tuple[bool, dict[str, dict[str, Any]]]]:
    """By identity number: whether the central bank knows them, and their facts by source."""
    found = {}
    kinds: tuple[Kind, ...] = ("person", "firm")
    for kind in kinds:
        for index in range(PEOPLE):
            subject = population().subject(kind, index)
            by_source: dict[str, dict[str, Any]] = {source: {} for source in SOURCES}
            for name, value in subject.facts.items():
                prefix = name.split(".")[0]
                source = {"credit": "central_bank", "bank": "bank_flow"}.get(prefix, prefix)
                if source in by_source:
                    by_source[source][name] = value
            found[subject.identity] = (subject.registered, by_source)
    return found


@dataclass
class Sources:
    """How each source is just now; the same for all replicas of bureau."""

    moods: dict[str, Mood] = field(default_factory=lambda: dict.fromkeys(SOURCES, "well"))
    latency_s: float = 0.02
    asked: Counter[str] = field(default_factory=Counter)


class SimWire(HttpWire):
    """HttpWire with the connection replaced: `ask`, its timeout and its retries are the real ones."""

    def __init__(
        self, sources: Sources, clock: Clock, timeout_s: float, loop: VirtualLoop, dice: random.Random,
        observer: Observer,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._timeout_s = timeout_s
        self._sources = sources
        self._loop = loop
        self._dice = dice
        self._observer = observer
        self._probes: Counter[tuple[str, int]] = Counter()
        self.breakers: dict[str, Breaker] = {}
        self.permits = 0

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        """As HttpWire, while counting what breakers let through."""
        breaker = self.breakers[source.id]
        if breaker.state is State.OPEN:
            self._observer.violate("breakers_hold", "", f"{source.id} was asked while its breaker was open")
        term = (source.id, sum(self._openings(source.id)))
        if breaker.state is not State.HALF_OPEN:
            return await super().ask(source, subject)
        self._probes[term] += 1
        if self._probes[term] > self.permits:
            text = f"{self._probes[term]} probes of {source.id} under way at once, with {self.permits} permits"
            self._observer.violate("breakers_hold", "", text)
        try:
            return await super().ask(source, subject)
        finally:
            self._probes[term] -= 1

    def _openings(self, source: str) -> list[bool]:
        return [change.state is State.OPEN for change in self.breakers[source].history]

    async def _once(self, source: Source, subject: Subject) -> Answer | str:
        self._sources.asked[source.id] += 1
        mood = self._sources.moods[source.id]
        latency_s = self._dice.expovariate(1.0) * self._sources.latency_s
        await self._clock.sleep(latency_s + (self._dice.uniform(0.5, 4.0) if mood == "slow" else 0.0))
        match mood:
            case "erring" if self._dice.random() < 0.7:
                raise aiohttp.ClientConnectionError
            case "dead":
                raise aiohttp.ClientConnectionError
            case "hanging":
                await self._loop.create_future()
            case "garbage":
                raise Garbage(f"{source.id}: nonsense")
            case "overloaded":
                # One that has too much to do now turns away, now breaks down.
                if self._dice.random() < 0.5:
                    raise aiohttp.ClientConnectionError
                return "overloaded"
        registered, facts = facts_of()[subject.number]
        now_s = self._clock.now().timestamp()
        found = registered or source.id != "central_bank"
        return Answer(found, source.read(subject.kind, facts[source.id]) if found else {}, now_s, now_s)

    async def close(self) -> None:
        """Nothing is held open."""
