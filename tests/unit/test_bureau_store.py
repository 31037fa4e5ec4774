"""Bureau's cache on both databases: kept per lender, newest wins, and a broken disk stops nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

import pytest
from sqlalchemy import inspect

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.database import Database, Row, Script, Statement, T, open_database
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.migrations import downgrade, upgrade
from loanmesh.runtime.settings import PrivacySettings
from services.bureau import store as store_module
from services.bureau.gather import Key
from services.bureau.keeping import FIRST, Keeping
from services.bureau.main import CLOCKS_DIFFER_S, _keep_private
from services.bureau.profile import Answer
from services.bureau.store import AnswerStore
from services.bureau.tables import metadata
from tests.builders import a_sealer


def a_key(subject: str = "h1", source: str = "tax", lender: str = "lenders/demo") -> Key:
    return lender, subject, source


def an_answer(fetched_at: float = 100.0) -> Answer:
    return Answer(True, {"tax.sales_12m_fen": int(fetched_at)}, fetched_at - 1, fetched_at)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    await asyncio.to_thread(upgrade, database_url, "services.bureau")
    opened = await open_database(database_url)
    yield opened
    await opened.close()


async def kept(database: Database, *answers: tuple[Key, Answer]) -> None:
    store = AnswerStore(database, FakeClock(), a_sealer())
    for key, answer in answers:
        await store.put(key, answer)
    await store.close()


async def test_an_answer_outlives_the_process(database: Database) -> None:
    await kept(database, (a_key(), an_answer()), (a_key("h2", "court"), an_answer(200)))
    keys = [a_key(), a_key("h2", "court"), a_key("h3")]
    assert await AnswerStore(database, FakeClock(), a_sealer()).get(keys) == {
        keys[0]: an_answer(),
        keys[1]: an_answer(200),
    }


async def test_lenders_do_not_share_answers(database: Database) -> None:
    await kept(database, (a_key(), an_answer()))
    store = AnswerStore(database, FakeClock(), a_sealer())
    assert await store.get([a_key(lender="lenders/other")]) == {}
    both = [a_key(lender="lenders/other"), a_key()]
    assert list(await store.get(both)) == [a_key()]


async def test_an_older_answer_never_replaces_a_newer(database: Database) -> None:
    await kept(database, (a_key(), an_answer(200)))
    await kept(database, (a_key(), an_answer(100)))
    assert (await AnswerStore(database, FakeClock(), a_sealer()).get([a_key()]))[a_key()] == an_answer(200)


async def test_a_thousand_at_once_are_all_kept(database: Database) -> None:
    answers = [(a_key(f"h{i}"), an_answer(i)) for i in range(1000)]
    await kept(database, *answers)
    found: dict[Key, Answer] = {}
    store = AnswerStore(database, FakeClock(), a_sealer())
    for start in range(0, 1000, 250):
        found |= await store.get([key for key, _ in answers[start : start + 250]])
    assert found == dict(answers)


async def test_what_may_no_longer_be_used_is_deleted(database: Database) -> None:
    await kept(database, (a_key("old"), an_answer(100)), (a_key("new"), an_answer(200)))
    await AnswerStore(database, FakeClock(), a_sealer()).purge(fetched_before=150)
    assert list(await AnswerStore(database, FakeClock(), a_sealer()).get([a_key("old"), a_key("new")])) == [
        a_key("new")
    ]


async def test_memory_is_bounded_and_the_disk_remembers(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "IN_MEMORY_MAX", 2)
    store = AnswerStore(database, FakeClock(), a_sealer())
    keys = [a_key(f"h{i}") for i in range(5)]
    for key in keys:
        await store.put(key, an_answer())
    await store.close()
    assert len(store._memory) == 2
    assert set(await store.get(keys)) == set(keys)


async def test_migrations_go_up_and_down_and_agree_with_the_tables(database_url: str) -> None:
    await asyncio.to_thread(upgrade, database_url, "services.bureau")
    if database_url.startswith("sqlite"):
        from sqlalchemy import create_engine, pool

        engine = create_engine(database_url, poolclass=pool.NullPool)
        seen, table = inspect(engine), metadata.tables["source_answer"]
        assert {c["name"] for c in seen.get_columns(table.name)} == {c.name for c in table.columns}
        assert [i["column_names"] for i in seen.get_indexes(table.name)] == [["fetched_at"]]
    await asyncio.to_thread(downgrade, database_url, "services.bureau")
    await asyncio.to_thread(upgrade, database_url, "services.bureau")


class BrokenDisk:
    """A database that is down."""

    async def run(self, script: Callable[[], Script[T]]) -> T:
        raise DependencyDown("the disk is full")

    async def read(self, sql: str, params: Sequence[object] = ()) -> list[tuple[object, ...]]:
        raise DependencyDown("the disk is gone")

    async def scan(self, sql: str, params: Sequence[object] = ()) -> list[tuple[object, ...]]:
        raise DependencyDown("the disk is gone")

    async def close(self) -> None: ...


async def test_a_broken_disk_stops_nothing() -> None:
    store = AnswerStore(BrokenDisk(), FakeClock(), a_sealer())
    await store.put(a_key(), an_answer())
    await store.purge(1e9)
    assert not await store.forget_erased(0.0)
    assert await store.get([a_key(), a_key("h2")]) == {a_key(): an_answer()}
    await store.close()


class Looks:
    """What looks for notes of erasures are told to begin at; answers as it is told."""

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.since: list[float] = []

    async def forget_erased(self, noted_since: float) -> bool:
        self.since.append(noted_since)
        await FakeClock().sleep(0)  # Others get their turn, as they do while a database answers.
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class MuchToSeal:
    """A table that takes longer than anybody waits."""

    async def reseal(self, after: Key, at_most: int) -> tuple[Key | None, int]:
        await asyncio.Event().wait()
        raise AssertionError


class Turns(FakeClock):
    """Each sleep is over at once; after so many, whoever sleeps is cancelled."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    async def sleep(self, seconds: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise asyncio.CancelledError
        self.advance(seconds)


async def test_what_was_erased_is_looked_for_while_much_is_sealed_anew_and_from_where_the_notes_were_read() -> None:
    clock, looks = Turns(5), Looks(False, RuntimeError("unforeseen"), True, True)
    began, settings = clock.now().timestamp(), PrivacySettings(keys_file="-", pass_every_s=600)
    with pytest.raises(asyncio.CancelledError):
        await _keep_private(cast(AnswerStore, looks), cast(Keeping, MuchToSeal()), settings, clock)
    # One of the sleeps is before the pass that seals anew, which does not end meanwhile.
    assert [since - began + CLOCKS_DIFFER_S for since in looks.since] == pytest.approx([0, 0, 0, 2400], abs=1)


async def test_what_a_replica_writes_after_another_erased_its_subject_does_not_come_back(database: Database) -> None:
    clock, sealer = FakeClock(), a_sealer()
    number = "110101199001011237"
    (subject,) = sealer.subjects("lenders/demo", number)
    now_s = clock.now().timestamp()
    asked, writes = (AnswerStore(database, clock, sealer) for _ in range(2))
    await writes.put(a_key(subject), an_answer(now_s - 1))
    await writes.put(a_key(subject, "court"), an_answer(now_s + 1))
    await asked.erase("lenders/demo", number, only_count=False)
    await writes.close()
    await asked.forget_erased(now_s - 60)  # On PostgreSQL the two may have met: neither then saw the other.
    assert await database.read("SELECT source FROM source_answer") == [("court",)], "asked for anew since"


async def test_what_is_erased_while_it_waits_to_be_written_leaves_the_writer_sound(database: Database) -> None:
    sealer = a_sealer()
    number = "110101199001011237"
    (subject,) = sealer.subjects("lenders/demo", number)

    class Meanwhile(FakeClock):
        async def sleep(self, seconds: float) -> None:
            await store.erase("lenders/demo", number, only_count=False)

    store = AnswerStore(database, Meanwhile(), sealer)
    await store.put(a_key(subject), an_answer())
    await store.close()  # Raises what the writer fell over.
    assert await database.read("SELECT source FROM source_answer") == []


async def test_what_was_being_written_during_an_erasure_goes_with_the_next_look(database: Database) -> None:
    clock, sealer = FakeClock(), a_sealer()
    number = "110101199001011237"
    (subject,) = sealer.subjects("lenders/demo", number)
    now_s = clock.now().timestamp()
    asked = AnswerStore(database, clock, sealer)
    await kept(database, (a_key(subject), an_answer(now_s - 1)), (a_key("other"), an_answer(now_s - 1)))
    rows = await database.read("SELECT * FROM source_answer WHERE subject_hash = ?", (subject,))
    await asked.erase("lenders/demo", number, only_count=False)
    # Its commit comes after the erasure's, which it did not see.
    await database.run(lambda: _insert(rows[0]))
    await AnswerStore(database, clock, sealer).forget_erased(now_s - 60)
    assert await database.read("SELECT subject_hash FROM source_answer") == [("other",)]


def _insert(row: Row) -> Script[None]:
    yield Statement(f"INSERT INTO source_answer VALUES ({', '.join('?' * len(row))})", [row])


async def test_answers_that_cannot_be_read_hide_none_from_being_sealed_anew(database: Database) -> None:
    await kept(database, *((a_key(f"h{i}"), an_answer(i + 2)) for i in range(6)))

    def spoil() -> Script[None]:
        yield Statement("UPDATE source_answer SET key_id = 'gone' WHERE subject_hash IN ('h0', 'h1', 'h2')")
        yield Statement(
            "UPDATE source_answer SET answer = ?, sealed = NULL, key_id = NULL WHERE subject_hash = 'h5'",
            [(an_answer().to_json(),)],
        )

    await database.run(spoil)
    keeping, moved = Keeping(database, a_sealer()), []
    place: Key | None = FIRST
    while place:
        place, count = await keeping.reseal(place, 2)
        moved.append(count)
    assert moved == [0, 1, 0]
