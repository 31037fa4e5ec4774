"""What is done to applications long after they were decided: sealed anew, erased, forgotten. SQL, as in `store`.

Each pass goes over the table in small transactions, from where the one before stopped; one replica does it at a time.
Nothing here touches an open application, but to wrap its data key anew, which changes no content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from lending.intake.v1.intake_service_pb2 import Application

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import Database, Row, Script, Statement
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.sealed import Unsealable
from services.intake.application import Happening, State, chain, digest
from services.intake.privacy import PARTS, Cover, Privacy, part_of
from services.intake.retention import Keep, Standing

_TAKE = """
INSERT INTO chore (name, place, told, owner, lease_until) VALUES (?, '', '', ?, {now} + ?)
ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, lease_until = excluded.lease_until
WHERE chore.lease_until < {now} OR chore.owner = excluded.owner RETURNING place, told"""
_PUT = "UPDATE chore SET place = ?, told = ?, lease_until = {now} + ? WHERE name = ? AND owner = ? RETURNING name"
_LEAVE = "UPDATE chore SET lease_until = 0 WHERE name = ? AND owner = ? RETURNING name"
_WALK = """
SELECT id, state, key_id, look_up_id, erased_at FROM application WHERE id > ? ORDER BY id LIMIT ?"""
_WHOLE = """
SELECT id, lender, revision, event_hash, state, updated_at, due_at, payload, original, key_id, data_key, look_up_id,
  erased_at FROM application WHERE id = ? {for_update}"""
_SEAL = """
UPDATE application SET payload = ?, original = ?, key_id = ?, data_key = ?
WHERE id = ? AND revision = ? AND key_id IS NULL"""
_REWRAP = "UPDATE application SET key_id = ?, data_key = ? WHERE id = ? AND key_id = ?"
_REHASH = "UPDATE application SET payload_hash = ?, look_up_id = ? WHERE id = ?"
_FIND = """
SELECT DISTINCT application_id FROM subject WHERE lender = ? AND subject_hash IN ({marks}) AND application_id > ?
ORDER BY application_id LIMIT ?"""
_ERASE = """
UPDATE application SET payload = ?, original = NULL, payload_hash = '', key_id = NULL, data_key = NULL,
  look_up_id = NULL, erased_at = ?, due_at = NULL, revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND revision = ?"""
_OVER = """
SELECT id FROM application WHERE erased_at IS NULL AND state <> 'PENDING' AND state = ? AND updated_at < ?
  AND (state <> 'DECIDED' OR due_at IS NULL OR due_at <= ?)
ORDER BY updated_at LIMIT ?"""
"""Without those whose offers can still be accepted: a page full of them would hide all that come after."""
_OLD = "SELECT id FROM application WHERE erased_at IS NOT NULL AND erased_at < ? ORDER BY erased_at LIMIT ?"
_USE = "SELECT key_id, look_up_id, count(*) FROM application WHERE erased_at IS NULL GROUP BY 1, 2"
# Whose hashes cannot be worked out, since the numbers in the payload cannot be read, are found by walking the table.
_UNREAD = """
INSERT INTO chore (name, place, told, owner, lease_until) VALUES ('forget', '', ?, '', 0)
ON CONFLICT (name) DO UPDATE SET place = '', told = excluded.told"""
_SUBJECTS = """
SELECT s.lender, s.subject_hash, s.application_id, a.id IS NULL OR a.erased_at IS NOT NULL FROM
  (SELECT lender, subject_hash, application_id FROM subject WHERE (lender, subject_hash, application_id) > (?, ?, ?)
   ORDER BY lender, subject_hash, application_id LIMIT ?) AS s
LEFT JOIN application a ON a.id = s.application_id ORDER BY 1, 2, 3"""
_FORGET = "DELETE FROM subject WHERE lender = ? AND subject_hash = ? AND application_id = ?"
_GO_ON = """
UPDATE chore SET place = ?, lease_until = {now} + ?
WHERE name = 'forget' AND owner = ? AND place = ? AND told = ? RETURNING name"""
WALK_ROWS = 1000
"""Rows whose key ids are read at once: about a millisecond."""
LEASE_S = 60.0
"""How long a replica has a pass to itself; taken again with each transaction."""
DONE = "~"
"""The place of a pass that came to the end. After all ids."""
log = structlog.get_logger()


@dataclass(frozen=True)
class Held:
    """One application as it stands, for whoever decides whether it goes."""

    id: str
    standing: Standing
    erased_at: float | None


class Keeping:
    """Passes over the applications of one database. All raise DependencyDown."""

    def __init__(self, database: Database, clock: Clock, owner: str, privacy: Privacy) -> None:
        self._database = database
        self._clock = clock
        self._owner = owner
        self._privacy = privacy

    # --- Who does it, and how far it has come ---

    async def take(self, chore: str) -> tuple[str, str] | None:
        """Take a pass: (place, what was told with it). None while another replica has it."""
        rows = await self._database.run(lambda: _answer(Statement(_TAKE, [(chore, self._owner, LEASE_S)])))
        return (rows[0][0], rows[0][1]) if rows else None

    async def put(self, chore: str, place: str, told: str, lease_s: float = LEASE_S) -> None:
        """Note how far a pass has come."""
        await self._database.run(lambda: _answer(Statement(_PUT, [(place, told, lease_s, chore, self._owner)])))

    async def leave(self, chore: str) -> None:
        """Let another replica have a pass, as far as it has come."""
        await self._database.run(lambda: _answer(Statement(_LEAVE, [(chore, self._owner)])))

    # --- Sealing anew ---

    async def reseal(self, after: str, at_most: int) -> tuple[str, int, int]:
        """Go on from an id: (last id looked at, or DONE; how many were sealed, wrapped or hashed anew; how many wait
        for their decision, and must be looked at again). What cannot be read is left for the pass of another day."""
        rows = await self._database.scan(_WALK, (after, WALK_ROWS))
        seal, look_up = self._privacy.sealer.keys.seal().id, self._privacy.look_up_id()
        place, wanted, waiting = DONE if len(rows) < WALK_ROWS else rows[-1][0], [], 0
        for application_id, state, key_id, look_up_id, erased_at in rows:
            if erased_at is not None or (key_id == seal and look_up_id == look_up):
                continue
            if key_id is None and not self._privacy.seals:
                continue
            if key_id is None and state == State.PENDING:
                waiting += 1  # Whoever works on it would commit plain evidence beside a sealed payload.
                continue
            wanted.append(application_id)
            if len(wanted) == at_most:
                place = application_id
                break
        moved = await self._database.run(lambda: self._reseal_all(wanted)) if wanted else 0
        return place, moved, waiting

    def _reseal_all(self, ids: Sequence[str]) -> Script[int]:
        moved = 0
        for row in (yield Statement(_WHOLE, [(id_,) for id_ in ids])):
            try:
                yield from self._reseal_one(row)
            except (DependencyDown, Unsealable) as error:
                log.error("reseal_failed", application=row[0], error=str(error))
            else:
                moved += 1
        return moved

    def _reseal_one(self, row: Row) -> Script[None]:
        id_, lender, revision, _, state, _, _, payload, original, key_id, wrapped, look_up_id, erased_at = row
        if erased_at is not None:
            return
        cover = self._privacy.stored(lender, id_, key_id, wrapped)
        plain = cover.unseal(payload, "payload")
        submitted = plain if original is None else cover.unseal(original, "original")
        if key_id is None:
            if state == State.PENDING:
                return
            yield from self._seal(id_, self._privacy.new(lender, id_), revision, plain, original and submitted)
        elif key_id != self._privacy.sealer.keys.seal().id and wrapped is not None:
            moved = self._privacy.sealer.rewrap(key_id, wrapped, cover.name)
            yield Statement(_REWRAP, [(moved.key_id, moved.wrapped, id_, key_id)])
        if look_up_id != self._privacy.look_up_id():
            hashes = [(lender, hash_, id_) for hash_ in self._hashes(lender, plain, only_current=True)]
            yield from self._forget_subject(lender, id_, plain)
            yield Statement("INSERT INTO subject (lender, subject_hash, application_id) VALUES (?, ?, ?)", hashes)
            print_ = self._privacy.fingerprint(digest(submitted))
            yield Statement(_REHASH, [(print_, self._privacy.look_up_id(), id_)])

    def _seal(self, id_: str, cover: Cover, revision: int, plain: bytes, submitted: bytes | None) -> Script[None]:
        original = None if submitted is None else cover.seal(submitted, "original")
        row = (cover.seal(plain, "payload"), original, cover.key_id, cover.wrapped, id_, revision)
        yield Statement(_SEAL, [row])
        for table, parts in (("decision", ("payload",)), ("evidence", PARTS[1:])):
            found = yield Statement(
                f"SELECT assessment, {', '.join(parts)} FROM {table} WHERE application_id = ?", [(id_,)]
            )
            names = ("decision",) if table == "decision" else parts
            sealed = [
                (*(cover.seal(b, part_of(one[0], n)) for b, n in zip(one[1:], names, strict=True)), id_, one[0])
                for one in found
            ]
            sets = ", ".join(f"{part} = ?" for part in parts)
            yield Statement(f"UPDATE {table} SET {sets} WHERE application_id = ? AND assessment = ?", sealed)

    async def use(self) -> dict[str, int]:
        """How many applications need each key, by its id; '' for those that are not sealed yet."""
        found: dict[str, int] = {}
        for key_id, look_up_id, count in await self._database.scan(_USE):
            for key in {key_id or "", look_up_id or ""}:
                found[key] = found.get(key, 0) + count
        return found

    # --- Erasing ---

    async def of_subject(self, lender: str, number: str, after: str, at_most: int) -> list[Held]:
        """Applications that a subject is party to, oldest first, from an id on."""
        hashes = self._privacy.sealer.subjects(lender, number)
        sql = _FIND.format(marks=", ".join("?" * len(hashes)))
        rows = await self._database.scan(sql, (lender, *hashes, after, at_most))
        found = await self._database.run(lambda: _answer(Statement(_WHOLE, [(row[0],) for row in rows])))
        return [_held(row) for row in found]

    async def over(self, state: State, closed_before: float, now_s: float, at_most: int) -> list[str]:
        """Ids of closed applications whose time is over."""
        return [row[0] for row in await self._database.scan(_OVER, (state.value, closed_before, now_s, at_most))]

    async def erase(
        self, ids: Sequence[str], rule: str, keep: Callable[[Standing], Keep | None]
    ) -> dict[str, Keep | None]:
        """Destroy the content of applications that nothing has us keep, in one transaction. What keeps each, as it
        stands in that transaction; None: it is erased now. Without those that were erased before.

        The data key goes with it: what an older copy of the table still holds is noise from then on, but for who has
        that copy's key. The row stays, and its history goes on with what was done and by which rule.
        """
        at = self._clock.now().timestamp()

        def script() -> Script[dict[str, Keep | None]]:
            found: dict[str, Keep | None] = {}
            for row in (yield Statement(_WHOLE, [(id_,) for id_ in sorted(ids)])):
                if row[12] is None:
                    found[row[0]] = keep(_held(row).standing)
                    if found[row[0]] is None:
                        yield from self._erase_one(row, rule, at)
            return found

        return await self._database.run(script)

    def _erase_one(self, row: Row, rule: str, at: float) -> Script[None]:
        id_, lender, revision, before = row[:4]
        try:
            plain = self._privacy.stored(lender, id_, row[9], row[10]).unseal(row[7], "payload")
            yield from self._forget_subject(lender, id_, plain)
        except (DependencyDown, Unsealable) as error:
            # It goes whether or not its key comes back, and must not hold up the others; its subjects' hashes follow.
            log.error("erased_unread", application=id_, error=str(error))
            yield Statement(_UNREAD, [(id_,)])
        event = Happening(revision + 1, "erased", at, self._owner, {"rule": rule})
        hash_ = chain(before, id_, event)
        yield Statement(_ERASE, [(b"", at, hash_, at, id_, revision)])
        yield Statement("UPDATE decision SET payload = ? WHERE application_id = ?", [(b"", id_)])
        yield Statement("DELETE FROM evidence WHERE application_id = ?", [(id_,)])
        yield Statement("DELETE FROM request WHERE application_id = ?", [(id_,)])
        details = f'{{"rule": "{rule}"}}'
        yield Statement(
            "INSERT INTO event (application_id, seq, kind, at, actor, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(id_, event.seq, event.kind, at, self._owner, details, hash_)],
        )

    async def forget(self, place: str, told: str) -> tuple[str, int] | None:
        """Delete hashes of subjects of applications that are erased, among the next ones after `place`: (the next
        place, or DONE; how many were deleted). None where the pass is no longer ours, or must begin anew since another
        application was erased unread.

        place, told  as they were taken; place as it was answered before, from then on.
        """
        after = json.loads(place) if place else ("", "", "")
        rows = await self._database.scan(_SUBJECTS, (*after, WALK_ROWS))
        gone = [row[:3] for row in rows if row[3]]
        next_place = DONE if len(rows) < WALK_ROWS else json.dumps(rows[-1][:3])

        def script() -> Script[bool]:
            ours = yield Statement(_GO_ON, [(next_place, LEASE_S, self._owner, place, told)])
            if ours:
                yield Statement(_FORGET, gone)
            return bool(ours)

        return (next_place, len(gone)) if await self._database.run(script) else None

    async def delete_histories(self, erased_before: float, at_most: int) -> int:
        """Delete rows that were erased before, with all that is kept of them; how many."""
        rows = await self._database.scan(_OLD, (erased_before, at_most))

        def script() -> Script[int]:
            for table, column in (("event", "application_id"), ("decision", "application_id"), ("application", "id")):
                yield Statement(f"DELETE FROM {table} WHERE {column} = ?", rows)
            return len(rows)

        return await self._database.run(script) if rows else 0

    def _hashes(self, lender: str, payload: bytes, *, only_current: bool = False) -> list[str]:
        numbers = [party.identity.value for party in Application.FromString(payload).parties]
        if only_current:
            return self._privacy.subjects(lender, numbers)
        return sorted({hash_ for number in numbers for hash_ in self._privacy.sealer.subjects(lender, number)})

    def _forget_subject(self, lender: str, id_: str, payload: bytes) -> Script[None]:
        yield Statement(_FORGET, [(lender, hash_, id_) for hash_ in self._hashes(lender, payload)])


def _held(row: Row) -> Held:
    return Held(row[0], Standing(State(row[4]), row[5], row[6]), row[12])


def _answer(statement: Statement) -> Script[list[Row]]:
    return (yield statement)
