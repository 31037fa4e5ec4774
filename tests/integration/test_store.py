"""Intake's store on both databases: once means once, whoever comes second."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import replace

import pytest

from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.database import Database, Script, Statement, open_database
from loanmesh.runtime.errors import DependencyDown, NotFound, RequestIdConflict, WrongState
from loanmesh.runtime.migrations import downgrade, upgrade
from services.intake.application import Claim, New, State, Stored, chain
from services.intake.ports import Awaiting, Decided, Deferred
from services.intake.privacy import Privacy
from services.intake.store import Store
from tests.builders import a_sealer, an_application

LENDER = "lenders/demo"
CLOCK = FakeClock()


def a_store(database: Database, owner: str = "a", lease_s: float = 30.0) -> Store:
    return Store(database, CLOCK, owner, lease_s, Privacy(a_sealer()))


def new(number: int, payload_hash: str = "h", request_id: str | None = None) -> New:
    payload = an_application("person", number).SerializeToString()
    return New(f"id-{number}", LENDER, "client", request_id or f"request-{number}", payload, payload_hash, 1, "app",
               CLOCK.now().timestamp())  # fmt: skip


async def accepted(store: Store, *numbers: int) -> list[Claim]:
    stored = await store.accept([(new(n), True) for n in numbers])
    return [s.claim for s in stored if s.claim]


def decided(claim: Claim) -> Decided:
    return Decided(claim, "APPROVED", "A", b"d", b"p", b"s", b"r", 1.0, None, {"outcome": "APPROVED"})


async def test_accepting_twice_stores_once(database: Database) -> None:
    store = a_store(database)
    first = await store.accept([(new(1), True)])
    again = await store.accept([(New(**{**new(2).__dict__, "request_id": "request-1"}), True), (new(3), False)])
    assert first[0].claim is not None
    assert again == [Stored("id-1", "h", True), Stored("id-3", "h", False, None)]
    assert await store.get_many(["id-2"]) == {}


async def test_many_accept_the_same_request_at_once(database: Database) -> None:
    store = a_store(database)
    answers = await asyncio.gather(*(store.accept([(new(n, request_id="same-request"), True)]) for n in range(20)))
    assert len({stored.id for (stored,) in answers}) == 1
    assert sum(not stored.existed for (stored,) in answers) == 1


async def test_a_claim_is_held_by_one(database: Database) -> None:
    one, other = a_store(database, "one"), a_store(database, "other")
    await one.accept([(new(n), False) for n in range(50)])
    claims = [c for batch in await asyncio.gather(*(s.claim(30) for s in (one, other, one, other))) for c in batch]
    assert sorted(c.id for c in claims) == sorted(f"id-{n}" for n in range(50))
    assert await one.claim(10) == []


async def test_who_lost_the_lease_decides_nothing(database: Database) -> None:
    slow, fast = a_store(database, "slow", lease_s=-1.0), a_store(database, "fast")
    (stale,) = await accepted(slow, 1)
    (fresh,) = await fast.claim(1)
    assert fresh.fence == stale.fence + 1
    assert await slow.renew([stale]) == set()
    assert await slow.settle([decided(stale)]) == set()
    assert await fast.settle([decided(fresh)]) == {"id-1"}
    assert await fast.settle([decided(fresh)]) == set()
    history = await fast.events(LENDER, "id-1")
    assert [event.kind for event in history] == ["accepted", "decided"]


async def test_who_takes_over_learns_whose_lease_ended_and_when(database: Database) -> None:
    gone, next_ = a_store(database, "gone", lease_s=-1.0), a_store(database, "next", lease_s=30.0)
    await accepted(gone, 1)
    (taken,) = await next_.claim(10)
    owner, _, end = taken.lost_lease.rpartition("@")
    assert owner == "gone"
    assert float(end) == pytest.approx(taken.not_before - 1.0, abs=0.01)
    await next_.release([taken])
    (again,) = await next_.claim(10)
    assert again.lost_lease == "", "it was given back, and no lease ended"


async def test_a_withdrawal_in_the_middle_of_work_wins(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    await store.change(
        LENDER, "id-1", "w-1", {"what": "this"}, "withdrawn", {}, lambda *_: {"state": State.WITHDRAWN.value}
    )
    assert await store.settle([decided(claim)]) == set()
    assert (await store.get(LENDER, "id-1")).state == State.WITHDRAWN


async def test_deferred_waits_its_time_and_is_told_once(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    await store.settle([Deferred(claim, ("source_missing:tax",), 60.0, 1.0)])
    assert await store.claim(10) == []
    (other,) = await accepted(store, 2)
    await store.settle([Deferred(other, ("x",), -1.0, 1.0)])
    (again,) = await store.claim(10)
    await store.settle([Deferred(again, ("x",), -1.0, 1.0)])
    assert [e.kind for e in await store.events(LENDER, "id-2")] == ["accepted", "deferred"]


async def test_a_change_asked_twice_happens_once(database: Database) -> None:
    store = a_store(database)
    await accepted(store, 1)
    for _ in range(2):
        await store.change(LENDER, "id-1", "w-1", {"what": "this"}, "withdrawn", {}, lambda *_: {"state": "WITHDRAWN"})
    with pytest.raises(RequestIdConflict):
        await store.change(LENDER, "id-1", "w-1", {"what": "that"}, "withdrawn", {}, lambda *_: {"state": "WITHDRAWN"})
    with pytest.raises(NotFound):
        await store.change("lenders/other", "id-1", "w-2", {}, "withdrawn", {}, lambda *_: {})
    assert len(await store.events(LENDER, "id-1")) == 2


async def test_a_request_id_used_otherwise_names_what_differs(database: Database) -> None:
    store = a_store(database)
    await accepted(store, 1)
    await store.change(
        LENDER, "id-1", "r-1", {"offer_id": "offer-1"}, "offer_accepted", {}, lambda *_: {"state": "DECIDED"}
    )
    for said, kind, fields in (
        ({"offer_id": "offer-2"}, "offer_accepted", "offer_id"),
        ({}, "withdrawn", "kind, offer_id"),
    ):
        with pytest.raises(RequestIdConflict) as refused:
            await store.change(LENDER, "id-1", "r-1", said, kind, {}, lambda *_: {})
        assert refused.value.metadata["fields"] == fields


async def test_what_was_submitted_is_kept_when_information_is_supplied(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    for payload in (b"more", b"most"):
        more = functools.partial(lambda said, *_: {"payload": said}, payload)
        await store.change(LENDER, "id-1", f"supply-{payload!r}", {}, "information_supplied", {}, more)
    assert await store.submitted(LENDER, "id-1") == claim.payload
    assert (await store.get(LENDER, "id-1")).payload == b"most"


async def test_what_was_missing_is_no_longer_told_of_a_withdrawn_application(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    missing = ({"field": "consents", "source": "tax", "reason": "CONSENT_MISSING"},)
    await store.settle([Awaiting(claim, missing, 2e9, 1.0)])
    assert (await store.get(LENDER, "id-1")).missing == missing
    await store.change(LENDER, "id-1", "w-1", {}, "withdrawn", {}, lambda *_: {"state": "WITHDRAWN"})
    assert (await store.get(LENDER, "id-1")).missing == ()


async def test_one_place_in_five_goes_by_age(database: Database) -> None:
    store = a_store(database)
    await store.accept([(replace(new(n), priority=3), False) for n in range(10)])
    await store.accept([(new(n), False) for n in range(100, 120)])
    claimed = await store.claim(10)
    assert sum(c.priority == 1 for c in claimed) == 8
    assert [c.priority for c in claimed[8:]] == [3, 3]


async def test_what_was_too_much_keeps_its_place(database: Database) -> None:
    store = a_store(database)
    first, second = await accepted(store, 1, 2)
    await store.settle([Deferred(first, ("source_missing:tax",), 0.0, 1.0, overloaded=True)])
    (again,) = await store.claim(10)
    assert (again.id, again.not_before) == (first.id, first.not_before)
    assert again.not_before <= second.not_before


async def test_callers_who_send_the_same_in_other_orders_do_not_block_each_other(database: Database) -> None:
    stores = [a_store(database, owner) for owner in ("a", "b")]
    for start in range(0, 1000, 200):
        batch = [(new(n), True) for n in range(start, start + 200)]
        # A second submit of the same is an application of its own until its request_id is seen to be taken.
        again = [(replace(n, id=f"again-{n.id}"), True) for n, _ in batch[::-1]]
        answers = await asyncio.gather(stores[0].accept(batch), stores[1].accept(again))
        assert [s.id for s in answers[0]] == [s.id for s in answers[1][::-1]]


async def test_of_two_leases_in_one_batch_the_newer_decides(database: Database) -> None:
    store = a_store(database, lease_s=-1.0)
    (lost,) = await accepted(store, 1)
    (held,) = await store.claim(1)
    assert await store.settle([decided(held), decided(lost)]) == {"id-1"}
    assert [e.kind for e in await store.events(LENDER, "id-1")] == ["accepted", "decided"]


async def test_renewing_beside_deciding_blocks_neither(database: Database) -> None:
    store = a_store(database)
    claims = await accepted(store, *range(200))
    half = claims[::2]
    settled, kept = await asyncio.gather(store.settle([decided(c) for c in half[::-1]]), store.renew(claims[::-1]))
    assert settled == {c.id for c in half}
    assert {c.id for c in claims[1::2]} <= kept


async def test_thousands_can_be_watched(database: Database) -> None:
    store = a_store(database)
    await accepted(store, 1)
    assert await store.revisions([f"id-{n}" for n in range(12_000)]) == {"id-1": 1}


async def test_what_is_overdue_expires_with_an_intact_history(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    await store.settle([Awaiting(claim, ({"field": "consents", "source": "tax", "reason": "X"},), due_at=2.0, at=1.0)])
    assert await store.expire_overdue() == 1
    assert (await store.get(LENDER, "id-1")).state == State.EXPIRED
    before = ""
    for event in await store.events(LENDER, "id-1"):
        bare = type(event)(event.seq, event.kind, event.at, event.actor, event.details)
        assert event.hash == chain(before, "id-1", bare)
        before = event.hash


async def test_pages_hold_everything_once(database: Database) -> None:
    store = a_store(database)
    await store.accept([(new(n), False) for n in range(25)])
    seen, token = [], ""
    while True:
        page, token = await store.page(LENDER, 10, token, "state = PENDING", "create_time")
        seen += [snapshot.id for snapshot in page]
        if not token:
            break
    assert sorted(seen) == sorted(f"id-{n}" for n in range(25))
    assert (await store.page("lenders/other", 10, "", "", ""))[0] == []


async def test_a_failing_script_changes_nothing_and_harms_nobody(database: Database) -> None:
    store = a_store(database)

    def broken() -> Script[None]:
        yield Statement("UPDATE application SET state = 'BROKEN'")
        raise NotFound("on purpose")

    good = accepted(store, 1)
    outcomes = await asyncio.gather(good, database.run(broken), return_exceptions=True)
    assert isinstance(outcomes[1], NotFound)
    assert (await store.get(LENDER, "id-1")).state == State.PENDING


async def test_a_database_that_is_away_says_so() -> None:
    with pytest.raises(DependencyDown):
        await open_database("postgresql://nobody@127.0.0.1:1/none")


def test_migrations_lead_to_the_tables_of_the_code_and_back(database_url: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from sqlalchemy import Connection, inspect
    from sqlalchemy.ext.asyncio import create_async_engine

    from services.bureau import tables as bureau
    from services.intake import tables as intake

    url = database_url.replace("postgresql://", "postgresql+asyncpg://").replace("sqlite://", "sqlite+aiosqlite://")

    async def check(work) -> list[object]:  # type: ignore[no-untyped-def]
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            found: list[object] = await connection.run_sync(work)
        await engine.dispose()
        return found

    for package, metadata in (("services.intake", intake.metadata), ("services.bureau", bureau.metadata)):
        upgrade(database_url, package)

        def drift(connection: Connection, metadata: object = metadata) -> list[object]:
            ours = {table.name for table in metadata.sorted_tables}  # type: ignore[attr-defined]

            def include(thing: object, name: str | None, kind: str, *_: object) -> bool:
                return kind != "table" or name in ours

            context = MigrationContext.configure(connection, opts={"include_object": include, "compare_type": True})
            return list(compare_metadata(context, metadata))  # type: ignore[arg-type]

        assert asyncio.run(check(drift)) == []
    for package in ("services.intake", "services.bureau"):
        downgrade(database_url, package)
    left = asyncio.run(check(lambda connection: inspect(connection).get_table_names()))
    assert {str(name) for name in left} <= {"intake_version", "bureau_version"}


async def test_the_store_runs_on_the_systems_clock_too(database: Database) -> None:
    store = Store(database, SystemClock(), "a", 5.0, Privacy(a_sealer()))
    await store.accept([(new(1), False)])
    ((priority, _, count, replicas),) = await store.backlog()
    assert (priority, count, replicas) == (1, 1, 0)


async def test_decisions_of_the_last_seconds_are_counted_up_to_a_bound(database: Database) -> None:
    store = a_store(database)
    claims = await accepted(store, *range(6))
    await store.settle([replace(decided(claim), decided_at=100.0 + n) for n, claim in enumerate(claims[:5])])
    assert await store.decided(102.0, 100) == 3
    assert await store.decided(0.0, 2) == 2
    assert await store.decided(200.0, 100) == 0


async def test_standing_tells_of_work_whose_owner_is_gone_and_not_of_a_backlog(database: Database) -> None:
    gone, there = a_store(database, "gone", lease_s=-5.0), a_store(database, "there")
    assert await there.standing(0.0) == (0.0, 0.0, 0, 0)
    await gone.accept([(new(1), True)])
    await there.accept([(new(2), True), (new(3), False)])
    await database.run(set_back("id-1", seconds=60.0))
    backlog_age_s, pending_age_s, unowned, parked = await there.standing(2.0)
    assert (unowned, parked) == (1, 0)
    assert 60 <= backlog_age_s < 120
    assert pending_age_s > 0
    assert (await there.standing(3600.0))[2] == 0, "its lease ended less than an hour ago"


async def test_what_rests_is_counted_by_what_it_waits_for_and_is_no_backlog(database: Database) -> None:
    store = a_store(database)
    assert await store.resting() == []
    first, second, third, _ = await accepted(store, *range(4))
    await store.settle([
        Deferred(first, ("source_missing:tax", "source_missing:court"), 60.0, 1.0),
        Deferred(second, ("source_missing:court",), 600.0, 1.0), Deferred(third, ("source_missing:court",), 300.0, 1.0),
    ])  # fmt: skip
    court, both = await store.resting()
    assert court[:2] == ("source_missing:court", 2)
    assert both[:2] == ("source_missing:tax,source_missing:court", 1)
    assert both[2] < court[2]
    assert sum(count for _, _, count, _ in await store.backlog()) == 1


def set_back(application_id: str, seconds: float) -> Callable[[], Script[None]]:
    def script() -> Script[None]:
        yield Statement(
            "UPDATE application SET not_before = not_before - ?, created_at = {now} - ? WHERE id = ?",
            [(seconds, seconds, application_id)],
        )

    return script


async def test_one_that_can_no_longer_be_read_is_parked_and_hides_no_other(database: Database) -> None:
    store = a_store(database, lease_s=-1.0)
    await accepted(store, 1, 2)

    def swap() -> Script[None]:
        yield Statement("UPDATE application SET payload = (SELECT payload FROM application WHERE id = ?) WHERE id = ?",
                        [("id-2", "id-1")])  # fmt: skip

    await database.run(swap)
    assert [claim.id for claim in await store.claim(10)] == ["id-2"]
    parked, _ = await store.parked(10, "", "unsealable")
    assert [(one.id, one.details["stage"]) for one in parked] == [("id-1", "open")]
    assert [claim.id for claim in await store.claim(10)] == ["id-2"], "nobody tries it again"
    assert [event.kind for event in await store.events(LENDER, "id-1")] == ["accepted", "parked"]
    page, _ = await store.page(LENDER, 10, "", "", "")
    assert [one.id for one in page] == ["id-2"]
    with pytest.raises(WrongState, match="id-1 cannot be read"):
        await store.get(LENDER, "id-1")


async def some_unreadable(store: Store, database: Database, *numbers: int) -> None:
    """Stored, and swapped with what belongs to another."""
    await store.accept([(new(n), False) for n in numbers])
    await database.run(
        lambda: _statement("UPDATE application SET payload = data_key WHERE id = ?", *((f"id-{n}",) for n in numbers))
    )


def _statement(sql: str, *rows: tuple[object, ...]) -> Script[None]:
    yield Statement(sql, rows or ((),))


async def test_one_that_cannot_be_read_is_withdrawn_and_released_like_any_other(database: Database) -> None:
    store = a_store(database)
    await some_unreadable(store, database, 1, 2)
    assert await store.claim(10) == []
    await store.change(LENDER, "id-1", "w-1", {}, "withdrawn", {}, lambda *_: {"state": State.WITHDRAWN.value})
    withdrawn = await store.changed(LENDER, "id-1")
    assert (withdrawn.state, withdrawn.payload, withdrawn.decision) == (State.WITHDRAWN, b"", None)
    await store.change(LENDER, "id-2", "r-1", {}, "released", {}, lambda *_: {"state": State.PENDING.value})
    assert (await store.changed(LENDER, "id-2")).state == State.PENDING
    with pytest.raises(WrongState, match="id-2 cannot be read"):
        await store.change(
            LENDER, "id-2", "s-1", {}, "information_supplied", {}, lambda _, read, __: {"payload": read()}
        )
    with pytest.raises(WrongState, match="id-2 cannot be read"):
        await store.submitted(LENDER, "id-2")


async def test_of_many_those_that_cannot_be_read_are_left_out(database: Database) -> None:
    store = a_store(database)
    await some_unreadable(store, database, 1)
    await store.accept([(new(2), False)])
    assert list(await store.get_many(["id-1", "id-2"])) == ["id-2"]


async def test_a_decision_without_its_cover_is_not_written_in_the_open(database: Database) -> None:
    store = a_store(database)
    (claim,) = await accepted(store, 1)
    with pytest.raises(ValueError, match="no store made it"):
        await store.settle([decided(replace(claim, cover=None))])
    assert (await store.get(LENDER, "id-1")).state == State.PENDING
