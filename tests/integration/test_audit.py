"""The second witness: what the databases say is read right, and what was taken away from them is missed."""

from __future__ import annotations

import asyncio

from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.intake.v1 import intake_service_pb2 as pb

from lab.audit import audit, pending
from lab.history import Recorder
from lab.judge import by_rule, check
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import Database, Script, Statement, open_database
from loanmesh.runtime.migrations import upgrade
from services.intake.application import Claim, New
from services.intake.ports import Decided
from services.intake.privacy import Privacy
from services.intake.store import Store
from tests.builders import a_profile, a_sealer, an_application

CLOCK = SystemClock()
LENDER = "lenders/demo"


async def accepted(store: Store, recorder: Recorder, count: int) -> list[Claim]:
    """Store some, as callers saw it."""
    claims = []
    for number in range(count):
        payload = an_application("person", number).SerializeToString()
        new = New(f"id-{number}", LENDER, "shop", f"request-{number}", payload, "hash", 1, "web", 1.0)
        (stored,) = await store.accept([(new, True)])
        assert stored.claim
        claims.append(stored.claim)
        name = f"{LENDER}/applications/{new.id}"
        recorder.submitted("shop", new.request_id)
        shown = pb.Application(name=name, state=pb.Application.STATE_PENDING, revision=1)
        recorder.acknowledged("shop", new.request_id, shown)
    return claims


def a_decline(claim: Claim, court: SourceReport.State.ValueType) -> Decided:
    """A decline that rests on the given answer of court, decided just now."""
    now = CLOCK.now()
    decision = pb.Decision(assessment=1, outcome=pb.Decision.OUTCOME_DECLINED)
    decision.decide_time.FromDatetime(now)
    profile = a_profile("person", 1, {"court": court}, now)
    return Decided(
        claim, "DECLINED", "E", decision.SerializeToString(), profile.SerializeToString(), b"", b"", now.timestamp(),
        None, {"assessment": "1"},
    )  # fmt: skip


async def set_up(url: str) -> tuple[Database, Store]:
    await asyncio.to_thread(upgrade, url, "services.intake")
    database = await open_database(url)
    return database, Store(database, CLOCK, "intake-1-x", 60.0, Privacy(a_sealer()))


async def broken(url: str, recorder: Recorder) -> dict[str, list[str]]:
    """Rules that do not hold, and for which applications."""
    witness = await audit(url, 2.0, a_sealer())
    found = by_rule(check([*recorder.records, *witness.records]))
    return {rule: [v.application.rsplit("/", 1)[1] for v in violations] for rule, violations in found.items()}


async def test_a_sound_run_has_no_violation(database_url: str) -> None:
    database, store = await set_up(database_url)
    recorder = Recorder(lambda: 1.0)
    claims = await accepted(store, recorder, 3)
    await store.settle([a_decline(claims[0], SourceReport.STATE_FRESH)])
    assert await pending(database_url) == 2
    assert await broken(database_url, recorder) == {}
    await database.close()


async def test_a_lost_one_and_a_decline_on_a_gap_are_found(database_url: str) -> None:
    database, store = await set_up(database_url)
    recorder = Recorder(lambda: 1.0)
    claims = await accepted(store, recorder, 3)
    await store.settle([a_decline(claims[0], SourceReport.STATE_MISSING)])
    await database.run(lambda: _statement("DELETE FROM application WHERE id = 'id-2'"))
    found = await broken(database_url, recorder)
    assert found == {"nothing_is_lost": ["id-2"], "declines_rest_on_evidence": ["id-0"]}
    await database.close()


async def test_one_decided_twice_in_its_history_is_found(database_url: str) -> None:
    database, store = await set_up(database_url)
    recorder = Recorder(lambda: 1.0)
    claims = await accepted(store, recorder, 1)
    await store.settle([a_decline(claims[0], SourceReport.STATE_FRESH)])
    await database.run(
        lambda: _statement(
            "INSERT INTO event (application_id, seq, kind, at, actor, details, hash)"
            " SELECT application_id, 3, kind, at, actor, details, hash FROM event WHERE seq = 2"
        )
    )
    assert (await broken(database_url, recorder))["decided_once"] == ["id-0"]
    await database.close()


def _statement(sql: str) -> Script[None]:
    yield Statement(sql)
