"""Gathering: dead, slow and joined sources, consents and freshness."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence

import pytest
from lending.bureau.v1.bureau_service_pb2 import GatherProfilesRequest, SourceReport
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.guard import BulkheadSettings, make_guard
from services.bureau.gather import Gatherer, Key, Subject
from services.bureau.profile import Answer
from services.bureau.sources import Garbage, Source, load_sources
from tests.builders import an_application


class Wire:
    """Sources that answer what they are told."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.asked = 0
        self.broken: dict[str, str] = {}
        self.hold: asyncio.Event | None = None

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        self.asked += 1
        if self.hold:
            await self.hold.wait()
        now_s = self.clock.now().timestamp()
        return self.broken.get(source.id) or Answer(True, {}, now_s, now_s)


class Memory:
    """A cache in memory."""

    def __init__(self) -> None:
        self.held: dict[Key, Answer] = {}

    async def get(self, keys: Sequence[Key]) -> Mapping[Key, Answer]:
        return {key: self.held[key] for key in keys if key in self.held}

    async def put(self, key: Key, answer: Answer) -> None:
        self.held[key] = answer


def bureau(wire: Wire, clock: FakeClock, budget_s: float = 1.0) -> Gatherer:
    sources = load_sources()
    bulkhead = BulkheadSettings(at_once_max=8, waiting_max=100)
    guards = {
        name: make_guard(name, "source", BreakerSettings(), bulkhead, clock, random.Random(1)) for name in sources
    }
    return Gatherer(sources, wire, Memory(), clock, lambda _, n: f"h{n}", guards=guards, budget_s=budget_s, retry_s=1.0)


def an_item(clock: FakeClock, without: str = "") -> GatherProfilesRequest.Item:
    application = an_application("firm", 1, clock.now())
    consents = [c for c in application.consents if c.source != without]
    return GatherProfilesRequest.Item(key="k", lender="lenders/demo", party=application.parties[0], consents=consents)


async def states(gatherer: Gatherer, item: GatherProfilesRequest.Item) -> dict[str, str]:
    (profile,) = await gatherer.gather([item])
    return {r.source: SourceReport.State.Name(r.state).removeprefix("STATE_") for r in profile.reports}


async def test_what_was_fetched_is_fresh_until_its_limit_then_asked_again() -> None:
    clock = FakeClock()
    wire = Wire(clock)
    gatherer = bureau(wire, clock)
    item = an_item(clock)
    assert set((await states(gatherer, item)).values()) == {"FRESH"}
    await states(gatherer, item)
    assert wire.asked == 5
    clock.advance(86_400)
    await states(gatherer, item)
    assert wire.asked == 8  # Central bank, court and bank flow live a day; tax and registry longer.


async def test_a_dead_source_is_stale_while_usable_then_missing() -> None:
    clock = FakeClock()
    wire = Wire(clock)
    gatherer = bureau(wire, clock)
    item = an_item(clock)
    await states(gatherer, item)
    wire.broken["court"] = "unavailable"
    clock.advance(2 * 86_400)
    assert (await states(gatherer, item))["court"] == "STALE"
    clock.advance(6 * 86_400)
    assert (await states(gatherer, item))["court"] == "MISSING"


async def test_without_consent_a_source_is_not_asked() -> None:
    clock = FakeClock()
    wire = Wire(clock)
    assert (await states(bureau(wire, clock), an_item(clock, without="tax")))["tax"] == "NO_CONSENT"
    assert wire.asked == 4


async def test_the_borrowers_consent_is_not_the_guarantors() -> None:
    clock = FakeClock()
    item = an_item(clock)
    item.party.role = Party.ROLE_GUARANTOR
    assert set((await states(bureau(Wire(clock), clock), item)).values()) == {"NO_CONSENT"}


async def test_two_askers_share_one_query_and_a_slow_answer_is_kept() -> None:
    clock = FakeClock()
    wire = Wire(clock)
    wire.hold = asyncio.Event()
    gatherer = bureau(wire, clock, budget_s=0.01)
    item = an_item(clock)
    profiles = await gatherer.gather([item, item])
    assert {r.missing_cause for p in profiles for r in p.reports} == {"timeout"}
    assert wire.asked == 5
    wire.hold.set()
    while gatherer._under_way:
        await clock.sleep(0)
    assert set((await states(gatherer, item)).values()) == {"FRESH"}
    assert wire.asked == 5


@pytest.mark.parametrize(
    "facts", [{"court.moon": 1}, {"court.enforcement_open_count": "many"}, {"court.is_dishonest_debtor": 1}]
)
def test_garbage_is_not_taken_for_evidence(facts: dict[str, object]) -> None:
    with pytest.raises(Garbage):
        load_sources()["court"].read("firm", facts)
