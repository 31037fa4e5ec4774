"""What the databases say when a run is over: every application, decision and event, read as an auditor would, by SQL.

The mesh's own answers are judged elsewhere; this is the second witness. It only reads, and only at the end.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import asyncpg
from lending.intake.v1 import intake_service_pb2 as pb

from lab.history import Event, Recorder, Standing, Told, digest_of
from loanmesh.runtime.sealed import Sealer, is_sealed

_APPLICATIONS = """
SELECT a.lender, a.id, a.revision, a.state, a.assessment, a.accepted_offer, a.owner, a.due_at, a.not_before, d.payload,
  a.key_id, a.data_key
FROM application a LEFT JOIN decision d ON d.application_id = a.id AND d.assessment = a.assessment ORDER BY a.id"""
_DECISIONS = """
SELECT a.lender, a.id, d.assessment, d.payload, e.profile, a.key_id, a.data_key FROM decision d
JOIN application a ON a.id = d.application_id
LEFT JOIN evidence e ON e.application_id = d.application_id AND e.assessment = d.assessment
ORDER BY a.id, d.assessment"""
_EVENTS = """
SELECT a.lender, a.id, e.seq, e.kind, e.details FROM event e JOIN application a ON a.id = e.application_id
ORDER BY a.id, e.seq"""
_PENDING = "SELECT count(*) FROM application WHERE state = 'PENDING'"


async def audit(database: str, at: float, sealer: Sealer) -> Recorder:
    """Standing, decisions with their evidence, and events of every application, as records of the time `at`."""
    applications, decisions, events = await read(database, _APPLICATIONS, _DECISIONS, _EVENTS)
    found = Recorder(lambda: at)
    for row in applications:
        found.add(_standing(row, at, sealer))
    for lender, id_, assessment, decision, profile, *key in decisions:
        evidence = pb.ExplainDecisionResponse()
        evidence.decision.ParseFromString(_part(sealer, lender, id_, assessment, "decision", decision, *key))
        evidence.profile.ParseFromString(_part(sealer, lender, id_, assessment, "profile", profile or b"", *key))
        found.explained(f"{lender}/applications/{id_}", evidence)
    for told in _histories(events, at):
        found.add(told)
    return found


async def pending(database: str) -> int:
    """Applications that nobody has decided yet."""
    (rows,) = await read(database, _PENDING)
    return int(rows[0][0])


async def read(database: str, *queries: str) -> list[Sequence[Any]]:
    """Rows of each query."""
    if database.startswith("sqlite:///"):
        path = database.removeprefix("sqlite:///")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
            return [connection.execute(query).fetchall() for query in queries]
    postgres = await asyncpg.connect(database, timeout=10)
    try:
        return [[tuple(row) for row in await postgres.fetch(query)] for query in queries]
    finally:
        await postgres.close()


def _part(
    sealer: Sealer, lender: str, id_: str, assessment: int, part: str, blob: bytes, key_id: str, wrapped: bytes
) -> bytes:
    name = f"{lender}/applications/{id_}"
    if not is_sealed(blob):
        return blob
    return sealer.open_key(key_id, wrapped, name).unseal(blob, f"{name}/assessments/{assessment}/{part}")


def _standing(row: Sequence[Any], at: float, sealer: Sealer) -> Standing:
    lender, id_, revision, state, assessment, accepted, owner, due_at, not_before, decision, *key = row
    shown = None
    if decision:
        shown = pb.Decision.FromString(_part(sealer, lender, id_, assessment, "decision", decision, *key))
    return Standing(
        at, f"{lender}/applications/{id_}", revision, state, assessment if shown else 0,
        digest_of(shown) if shown else "", accepted, owner or "", due_at, not_before if state == "PENDING" else None,
    )  # fmt: skip


def _histories(rows: Sequence[Sequence[Any]], at: float) -> Iterator[Told]:
    events: dict[str, list[Event]] = {}
    for lender, id_, seq, kind, details in rows:
        event = Event(seq, kind, json.loads(details).get("assessment", ""))
        events.setdefault(f"{lender}/applications/{id_}", []).append(event)
    # The chain of hashes is the mesh's own to check, and is asked of it for a sample.
    return (Told(at, name, tuple(found), chain_intact=True) for name, found in events.items())
