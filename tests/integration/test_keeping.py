"""Long after the decision, on both databases: sealed anew after a rotation, erased, and still an intact history."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import Any

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.database import Database, Script, Statement
from loanmesh.runtime.errors import RequestIdConflict, WrongState
from loanmesh.runtime.keys import KeyRing, Keys, KeySet, new_key
from loanmesh.runtime.sealed import Sealer, is_sealed
from services.intake import erasure, keeping
from services.intake.application import Claim, Happening, New, State, chain, digest
from services.intake.erasure import Eraser, Fate, Upkeep
from services.intake.erasure_servicer import told
from services.intake.keeping import DONE, Held, Keeping
from services.intake.ports import Decided
from services.intake.privacy import Privacy
from services.intake.retention import DAY_S, RetentionSettings
from services.intake.store import Store
from tests.builders import RING, an_application

LENDER = "lenders/demo"
CLOCK = FakeClock()
RULES = RetentionSettings()


class Replica:
    """A store and the passes of one replica, under the keys given."""

    def __init__(self, database: Database, ring: KeyRing = RING, *, seals: bool = True, at_s: float = 0.0) -> None:
        self.clock = FakeClock()
        self.clock.advance(at_s)
        self.keys = Keys(ring, self.clock)
        self.privacy = Privacy(Sealer(self.keys), seals=seals)
        self.store = Store(database, self.clock, "a", 30.0, self.privacy)
        self.keeping = Keeping(database, self.clock, "a", self.privacy)
        self.evidence = Evidence()
        self.eraser = Eraser(self.keeping, self.evidence, RULES, self.clock)
        self.reports: list[dict[str, object]] = []
        self.upkeep = Upkeep(
            self.keeping, RULES, self.privacy.goal, self.clock, 3, lambda _, **facts: self.reports.append(facts)
        )


class Evidence:
    """A bureau that remembers whom it was told to forget."""

    def __init__(self) -> None:
        self.forgotten: list[tuple[str, bool]] = []

    async def erase_subject(self, lender: str, kind: int, number: str, *, only_count: bool) -> int:
        self.forgotten.append((number, only_count))
        return 2


def number_of(index: int) -> str:
    return an_application("person", index).parties[0].identity.value


def new(index: int, subject: int | None = None) -> New:
    payload = an_application("person", index if subject is None else subject).SerializeToString(deterministic=True)
    numbers = (number_of(index if subject is None else subject),)
    return New(
        f"id-{index:03d}", LENDER, "shop", f"request-{index}", payload, digest(payload), 1, "app", 1.0, "", numbers
    )


async def accepted(replica: Replica, *news: New) -> list[Claim]:
    return [stored.claim for stored in await replica.store.accept([(one, True) for one in news]) if stored.claim]


async def declined(replica: Replica, *news: New) -> None:
    claims = await accepted(replica, *news)
    at = replica.clock.now().timestamp()
    results = [Decided(c, "DECLINED", "E", b"decision", b"profile", b"score", b"pricing", at, None, {}) for c in claims]
    assert len(await replica.store.settle(results)) == len(claims)


async def blobs(database: Database) -> list[bytes]:
    """Everything stored of anybody's content."""
    found = []
    for sql in (
        "SELECT payload FROM application",
        "SELECT original FROM application",
        "SELECT payload FROM decision",
        "SELECT profile FROM evidence",
        "SELECT score FROM evidence",
        "SELECT pricing FROM evidence",
    ):
        found += [bytes(row[0]) for row in await database.scan(sql) if row[0] is not None]
    return sorted(found)


async def intact(store: Store, application_id: str) -> bool:
    before = ""
    for event in await store.events(LENDER, application_id):
        bare = Happening(event.seq, event.kind, event.at, event.actor, event.details)
        if event.hash != chain(before, application_id, bare):
            return False
        before = event.hash
    return bool(before)


def rotated(*, without_old: bool = False) -> KeyRing:
    """Newer keys, in use for a minute."""
    at = CLOCK.now() - dt.timedelta(minutes=1)
    seal, look_up = SECOND
    old = ((), ()) if without_old else (RING.seal.keys, RING.look_up.keys)
    return KeyRing(
        KeySet((*old[0], dataclasses.replace(seal, current_from=at))),
        KeySet((*old[1], dataclasses.replace(look_up, current_from=at))),
    )


SECOND = (new_key("seal", CLOCK.now()), new_key("look_up", CLOCK.now()))


async def test_nothing_personal_is_stored_in_the_open(database: Database) -> None:
    await declined(Replica(database), new(1))
    stored = await blobs(database)
    assert len(stored) == 5
    assert all(is_sealed(blob) for blob in stored)
    assert not any(number_of(1).encode() in blob for blob in stored)


async def test_a_blob_of_another_application_is_not_read_for_ones_own(database: Database) -> None:
    replica = Replica(database)
    await declined(replica, new(1), new(2))
    swap = Statement(
        "UPDATE application SET payload = (SELECT payload FROM application WHERE id = 'id-002') WHERE id = 'id-001'"
    )
    await database.run(lambda: _run(swap))
    with pytest.raises(Exception, match=r"id-001/payload was not sealed for it"):
        await replica.store.get(LENDER, "id-001")


async def test_after_a_rotation_all_moves_to_the_new_keys_and_the_old_may_go(database: Database) -> None:
    await declined(Replica(database), *(new(n) for n in range(8)))
    before = await blobs(database)
    after = Replica(database, rotated())
    assert await after.upkeep.reseal() == 8
    assert await blobs(database) == before, "the content is not touched"
    assert await after.keeping.use() == {SECOND[0].id: 8, SECOND[1].id: 8}
    # Once more finds nothing to do.
    assert await after.upkeep.reseal() == 0
    alone = Replica(database, rotated(without_old=True))
    assert (await alone.store.get(LENDER, "id-003")).payload == new(3).payload
    assert await alone.store.decision_with_evidence(LENDER, "id-003", 0) == (
        b"decision",
        b"profile",
        b"score",
        b"pricing",
    )
    fates, _, _ = await alone.eraser.erase(LENDER, 1, number_of(3), only_look=True)
    assert [fate.id for fate in fates] == ["id-003"]
    # Asked again with the same request_id, it is known; with another payload, it is a conflict.
    (same,) = await alone.store.accept([(new(3), False)])
    assert same.payload_hash == new(3).payload_hash
    (other,) = await alone.store.accept([(dataclasses.replace(new(3), payload_hash=digest(b"other")), False)])
    assert other.payload_hash != digest(b"other")


async def test_a_pass_that_is_cut_goes_on_and_only_one_replica_is_at_it(database: Database) -> None:
    await declined(Replica(database), *(new(n) for n in range(5)))
    after = Replica(database, rotated())
    other = Keeping(database, CLOCK, "b", after.privacy)
    goal = after.privacy.goal()
    assert await after.keeping.take("reseal") == ("", "")
    place, moved, _ = await after.keeping.reseal("", 2)
    await after.keeping.put("reseal", place, goal)
    assert (place, moved) == ("id-001", 2)
    assert await other.take("reseal") is None
    assert await after.keeping.take("reseal") == ("id-001", goal)
    assert await after.upkeep.reseal() == 3


async def test_one_that_cannot_be_read_is_not_come_back_to_on_the_same_day(database: Database) -> None:
    await declined(Replica(database), new(1), new(2))
    await _set(database, "id-001", data_key=b"spoiled")
    after = Replica(database, rotated())
    assert await after.upkeep.reseal() == 1
    assert await after.keeping.take("reseal") == (DONE, after.privacy.goal())
    tomorrow = Replica(database, rotated(), at_s=DAY_S)
    await _set(database, "id-002", look_up_id="as before")
    assert await tomorrow.upkeep.reseal() == 1


async def test_what_was_stored_before_sealing_is_read_and_sealed_once_it_is_decided(database: Database) -> None:
    before = Replica(database, seals=False)
    await declined(before, new(1))
    (open_claim,) = await accepted(before, new(2))
    assert not any(is_sealed(blob) for blob in await blobs(database))
    now = Replica(database)
    assert (await now.store.get(LENDER, "id-001")).payload == new(1).payload
    assert await now.upkeep.reseal() == 1
    assert sum(is_sealed(blob) for blob in await blobs(database)) == 5
    # The open one is worked on by somebody: it waits, and is sealed after that.
    await now.store.settle([Decided(open_claim, "DECLINED", "E", b"d", b"p", b"s", b"r", 2.0, None, {})])
    assert (await now.keeping.use())[""] == 1
    assert await now.upkeep.reseal() == 1
    assert all(is_sealed(blob) for blob in await blobs(database))
    assert await now.store.decision_with_evidence(LENDER, "id-002", 0) == (b"d", b"p", b"s", b"r")


async def test_who_asks_is_forgotten_and_what_must_be_kept_says_why(database: Database) -> None:
    replica = Replica(database)
    await declined(replica, new(1, subject=7), new(2, subject=8))
    await accepted(replica, new(3, subject=7))
    await declined(replica, new(4, subject=7))
    await _set(database, "id-004", state="OFFER_ACCEPTED")
    looked, _, _ = await replica.eraser.erase(LENDER, 1, number_of(7), only_look=True)
    fates, more, answers = await replica.eraser.erase(LENDER, 1, number_of(7), only_look=False)
    assert looked == fates
    assert (more, answers, replica.evidence.forgotten) == (False, 2, [(number_of(7), True), (number_of(7), False)])
    assert [(fate.id, fate.erased, fate.keep.rule if fate.keep else "") for fate in fates] == [
        ("id-001", True, ""), ("id-003", False, "open"), ("id-004", False, "loan_records")
    ]  # fmt: skip
    until = fates[2].keep and fates[2].keep.until
    assert until == pytest.approx(replica.clock.now().timestamp() + RULES.accepted_days * DAY_S)
    gone = await replica.store.get(LENDER, "id-001")
    assert (gone.payload, gone.decision, gone.state) == (b"", None, State.DECIDED)
    assert gone.erased_at is not None
    assert await replica.store.decision_with_evidence(LENDER, "id-001", 0) is None
    assert [event.kind for event in await replica.store.events(LENDER, "id-001")] == ["accepted", "decided", "erased"]
    assert await intact(replica.store, "id-001")
    assert (await replica.store.get(LENDER, "id-002")).payload == new(2, subject=8).payload
    # Again changes nothing, and finds no way to what was erased.
    again, _, _ = await replica.eraser.erase(LENDER, 1, number_of(7), only_look=False)
    assert [fate.id for fate in again] == ["id-003", "id-004"]


async def test_one_that_is_accepted_while_its_subject_is_being_forgotten_is_not_told_as_erased(
    database: Database,
) -> None:
    replica = Replica(database)
    await declined(replica, new(1, subject=7), new(2, subject=7))

    class Overtaken(Keeping):
        """Somebody accepts an offer between the look and the erasure."""

        async def of_subject(self, *about: Any) -> list[Held]:
            found = await super().of_subject(*about)
            await _set(database, "id-001", state="OFFER_ACCEPTED")
            return found

    keeping = Overtaken(database, replica.clock, "a", replica.privacy)
    eraser = Eraser(keeping, replica.evidence, RULES, replica.clock)
    fates, _, _ = await eraser.erase(LENDER, 1, number_of(7), only_look=False)
    assert [(fate.id, fate.erased, fate.keep.rule if fate.keep else "") for fate in fates] == [
        ("id-001", False, "loan_records"), ("id-002", True, ""),
    ]  # fmt: skip
    assert (await replica.store.get(LENDER, "id-001")).erased_at is None


async def test_offers_that_can_still_be_accepted_do_not_hide_what_is_over(database: Database) -> None:
    await declined(Replica(database), *(new(n) for n in range(6)))
    later = Replica(database, at_s=(RULES.declined_days + 1) * DAY_S)
    for number in range(4):  # More than are looked at together, and first in line.
        await _set(database, f"id-{number:03d}", due_at=later.clock.now().timestamp() + DAY_S)
    assert await later.upkeep.erase_over() == 2
    assert await database.scan("SELECT id FROM application WHERE erased_at IS NOT NULL ORDER BY id") == [
        ("id-004",), ("id-005",)
    ]  # fmt: skip


async def test_what_was_erased_cannot_be_changed_and_is_never_submitted_twice(database: Database) -> None:
    replica = Replica(database)
    await declined(replica, new(1))
    await replica.eraser.erase(LENDER, 1, number_of(1), only_look=False)
    with pytest.raises(WrongState, match="was erased on 2026-11-24"):
        await replica.store.change(LENDER, "id-001", "late-request", {}, "withdrawn", {}, lambda *_: {"due_at": None})
    (stored,) = await replica.store.accept([(dataclasses.replace(new(1), id="id-900"), True)])
    assert (stored.id, stored.existed, stored.payload_hash) == ("id-001", True, new(1).payload_hash)


async def test_what_a_change_said_is_not_stored_and_still_compared(database: Database) -> None:
    replica = Replica(database)
    await accepted(replica, new(1))
    said = {"declaration": "monthly income 1234567"}
    await replica.store.change(
        LENDER, "id-001", "request-x", said, "information_supplied", {}, lambda *_: {"due_at": None}
    )
    (row,) = await database.scan("SELECT said FROM request")
    assert "1234567" not in row[0]
    after = Replica(database, rotated())
    await after.store.change(
        LENDER, "id-001", "request-x", said, "information_supplied", {}, lambda *_: {"due_at": None}
    )
    with pytest.raises(RequestIdConflict, match="declaration"):
        await after.store.change(
            LENDER,
            "id-001",
            "request-x",
            {"declaration": "more"},
            "information_supplied",
            {},
            lambda *_: {"due_at": None},
        )


async def test_content_goes_by_itself_when_its_time_is_over_and_the_history_later(database: Database) -> None:
    replica = Replica(database)
    await declined(replica, *(new(n) for n in range(5)))
    await accepted(replica, new(7))
    await _set(database, "id-001", state="WITHDRAWN")
    await _set(database, "id-002", state="OFFER_ACCEPTED")
    later = Replica(database, at_s=(RULES.ended_days + 1) * DAY_S)
    assert await later.upkeep.erase_over() == 1
    later = Replica(database, at_s=(RULES.declined_days + 1) * DAY_S)
    assert await later.upkeep.erase_over() == 3
    later = Replica(database, at_s=(RULES.accepted_days + 1) * DAY_S)
    assert await later.upkeep.erase_over() == 1
    assert await later.upkeep.erase_over() == 0
    assert (await later.store.get(LENDER, "id-007")).payload == new(7).payload, "an open one is never touched"
    events = await later.store.events(LENDER, "id-002")
    assert events[-1].details == {"rule": "offer_accepted_is_over"}
    assert await intact(later.store, "id-002")
    last = Replica(database, at_s=(RULES.accepted_days + RULES.history_days + 2) * DAY_S)
    await last.upkeep.erase_over()
    assert [row[0] for row in await database.scan("SELECT id FROM application")] == ["id-007"]
    assert [row[0] for row in await database.scan("SELECT DISTINCT application_id FROM event")] == ["id-007"]


async def test_one_whose_key_is_away_is_given_back_and_decided_when_the_key_is_there(database: Database) -> None:
    await Replica(database).store.accept([(new(1), False)])
    without = Replica(database, rotated(without_old=True))
    await without.store.accept([(new(2), False)])
    assert [claim.id for claim in await without.store.claim(10)] == ["id-002"]
    sql = "SELECT owner, lease_until, not_before > {now} + 5, state FROM application WHERE id = 'id-001'"
    ((owner, lease_until, is_later, state),) = await database.read(sql)
    assert (owner, lease_until, bool(is_later), state) == (None, None, True, "PENDING")
    await _set(database, "id-001", not_before=1.0)
    assert [claim.id for claim in await Replica(database).store.claim(10)] == ["id-001"]


async def test_one_whose_key_is_away_stops_no_erasure_and_goes_with_the_others(database: Database) -> None:
    await declined(Replica(database), new(1))
    without = Replica(database, rotated(without_old=True))
    await declined(without, new(2))
    later = Replica(database, rotated(without_old=True), at_s=(RULES.declined_days + 1) * DAY_S)
    assert await later.upkeep.erase_over() == 2
    assert await database.scan("SELECT id FROM application WHERE data_key IS NOT NULL OR erased_at IS NULL") == []
    assert await later.store.decision_with_evidence(LENDER, "id-001", 0) is None


async def found(database: Database) -> list[str]:
    """Applications that somebody who has the look-up key and a number would find."""
    return [row[0] for row in await database.scan("SELECT application_id FROM subject ORDER BY 1")]


async def test_the_subjects_of_one_that_was_erased_unread_are_forgotten_as_well(database: Database) -> None:
    await declined(Replica(database), new(1))
    young = Replica(database, rotated(without_old=True))
    await accepted(young, new(2))
    later = Replica(database, rotated(without_old=True), at_s=(RULES.declined_days + 1) * DAY_S)
    assert await later.upkeep.erase_over() == 1
    assert await found(database) == ["id-001", "id-002"]
    assert await later.upkeep.forget() == 1
    assert await found(database) == ["id-002"]


async def test_forgetting_goes_on_where_it_was_cut_and_begins_anew_where_another_was_erased_unread(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "WALK_ROWS", 2)
    await declined(Replica(database), *(new(n) for n in range(5)))
    replica = Replica(database, rotated(without_old=True))
    await replica.keeping.erase([f"id-{n:03d}" for n in range(4)], "asked", lambda _: None)
    place, told = await replica.keeping.take("forget") or ("", "")
    first = await replica.keeping.forget(place, told)
    assert first
    assert first[1] + len(await found(database)) == 5
    await replica.keeping.erase(["id-004"], "asked", lambda _: None)
    assert await replica.keeping.forget(first[0], told) is None, "what was erased since may lie behind"
    assert first[1] + await replica.upkeep.forget() == 5
    assert await found(database) == []
    assert (await replica.keeping.take("forget") or ("", ""))[0] == DONE


async def test_a_subject_with_many_kept_applications_is_forgotten_in_one_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "AT_ONCE_MAX", 3)
    monkeypatch.setattr(erasure, "ROWS_MAX", 2)
    replica = Replica(database)
    await accepted(replica, *(new(n, subject=7) for n in range(7)))
    await declined(replica, *(new(n, subject=7) for n in range(7, 11)))
    looked, more, _ = await replica.eraser.erase(LENDER, 1, number_of(7), only_look=True)
    assert (sum(fate.erased for fate in looked), more) == (3, True)
    for erased, left in ((3, True), (1, False)):
        fates, more, _ = await replica.eraser.erase(LENDER, 1, number_of(7), only_look=False)
        assert (sum(fate.erased for fate in fates), more) == (erased, left)
    assert [fate.id for fate in fates if not fate.erased] == [f"id-{n:03d}" for n in range(7)]


def test_what_was_erased_is_told_before_what_is_kept_where_not_all_of_it_fits() -> None:
    kept = [Fate(f"kept-{n}", erased=False) for n in range(erasure.AT_ONCE_MAX + 5)]
    gone = [Fate(f"gone-{n}", erased=True) for n in range(3)]
    shown = told([*kept, *gone])
    assert shown == [*kept[: erasure.AT_ONCE_MAX - 3], *gone]


async def _set(database: Database, application_id: str, **columns: object) -> None:
    names = ", ".join(f"{name} = ?" for name in columns)
    await database.run(
        lambda: _run(Statement(f"UPDATE application SET {names} WHERE id = ?", [(*columns.values(), application_id)]))
    )


def _run(statement: Statement) -> Script[None]:
    yield statement
