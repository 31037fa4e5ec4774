"""Intake's store: the only module here that knows SQL. Each change is one script, one transaction, on either database.

Two numbers keep it safe. `fence` counts claims: who lost a lease holds an old one and changes nothing. `revision`
counts events: any change that somebody else made first makes ours fail.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import Database, Row, Script, Statement
from loanmesh.runtime.errors import DependencyDown, InvalidRequest, NotFound, RequestIdConflict, WrongState
from loanmesh.runtime.redaction import mask
from loanmesh.runtime.sealed import Unsealable
from services.intake.application import Claim, Happening, New, ParkedView, Snapshot, State, Stored, chain, erased
from services.intake.held import AGED_SHARE
from services.intake.ports import Apply, Awaiting, Broken, Decided, Deferred, Parked, Result
from services.intake.privacy import PARTS, Privacy, part_of

_INSERT = """
INSERT INTO application (id, lender, client_id, request_id, payload, payload_hash, priority, channel, created_at,
  updated_at, traceparent, key_id, data_key, look_up_id, owner, lease_until, event_hash, not_before,
  fence, attempts, state, waiting_for, missing, assessment, accepted_offer, revision)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {now} + ?, ?, {now}, 1, 1, 'PENDING', '[]', '[]', 1, '', 1)
ON CONFLICT (lender, client_id, request_id) DO NOTHING RETURNING id, not_before"""
_FIND = "SELECT id, payload_hash FROM application WHERE lender = ? AND client_id = ? AND request_id = ?"
_INSERT_SUBJECT = "INSERT INTO subject (lender, subject_hash, application_id) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
_CLAIM = """
UPDATE application SET owner = ?, fence = fence + 1, attempts = attempts + 1, lease_until = {now} + ?,
  lost_lease = COALESCE(owner || '@' || CAST(lease_until AS TEXT), '')
WHERE id IN (SELECT id FROM application
  WHERE state = 'PENDING' AND not_before <= {now} AND (owner IS NULL OR lease_until < {now})
  ORDER BY {order} LIMIT ? {skip_locked})
RETURNING id, lender, fence, assessment, attempts, revision, event_hash, payload, waiting_for, created_at, priority,
  not_before, traceparent, faults, original IS NOT NULL, lost_lease, key_id, data_key"""
_CLAIM_URGENT = _CLAIM.replace("{order}", "priority, not_before")
_CLAIM_OLDEST = _CLAIM.replace("{order}", "not_before")
_SYNC = Statement("SELECT {synced}")
"""What was found instead of written may be on one disk only: the answer is to wait until it is on all it should be."""
_RENEW = """
UPDATE application SET lease_until = {now} + ? WHERE id = ? AND fence = ? AND owner = ? AND state = 'PENDING'
RETURNING id"""
_LATER = """
UPDATE application SET owner = NULL, lease_until = NULL, not_before = {now} + ?
WHERE id = ? AND fence = ? AND owner = ?"""
_RELEASE = "UPDATE application SET owner = NULL, lease_until = NULL WHERE id = ? AND fence = ? AND owner = ?"
# Fence and revision before the inserts: a replica that lost its lease must fail here, not later.
_DECIDE = """
UPDATE application SET state = 'DECIDED', outcome = ?, grade = ?, due_at = ?, owner = NULL, lease_until = NULL,
  waiting_for = '[]', missing = '[]', revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_AWAIT = """
UPDATE application SET state = 'AWAITING_INFORMATION', missing = ?, due_at = ?, owner = NULL, lease_until = NULL,
  waiting_for = '[]', revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_DEFER = """
UPDATE application SET owner = NULL, lease_until = NULL, waiting_for = ?,
  not_before = CASE WHEN ? = 1 THEN not_before ELSE {now} + ? END, faults = faults + ?,
  revision = revision + ?, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_PARK = """
UPDATE application SET state = 'PARKED', due_at = ?, owner = NULL, lease_until = NULL, waiting_for = '["parked"]',
  faults = faults + 1, revision = revision + 1, event_hash = ?, updated_at = ?
WHERE id = ? AND fence = ? AND revision = ? AND state = 'PENDING' RETURNING id"""
_INSERT_EVENT = "INSERT INTO event (application_id, seq, kind, at, actor, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)"
_INSERT_DECISION = """
INSERT INTO decision (application_id, assessment, fence, payload, decided_at) VALUES (?, ?, ?, ?, ?)"""
_INSERT_EVIDENCE = """
INSERT INTO evidence (application_id, assessment, profile, score, pricing) VALUES (?, ?, ?, ?, ?)"""
_SNAPSHOT = """
SELECT a.id, a.lender, a.payload, a.state, a.not_before, a.waiting_for, a.missing, a.due_at, a.assessment,
  a.accepted_offer, a.revision, a.created_at, a.updated_at, d.payload, a.priority,
  a.erased_at, a.key_id, a.data_key
FROM application a LEFT JOIN decision d ON d.application_id = a.id AND d.assessment = a.assessment """
_LOCK = """
SELECT revision, event_hash, state, payload, original, key_id, data_key, erased_at FROM application
WHERE id = ? AND lender = ? {for_update}"""
_FIND_REQUEST = "SELECT said FROM request WHERE application_id = ? AND request_id = ?"
_INSERT_REQUEST = "INSERT INTO request (application_id, request_id, said) VALUES (?, ?, ?)"
_OVERDUE = """
SELECT id, revision, event_hash, state FROM application
WHERE due_at IS NOT NULL AND due_at < {now} AND state IN ('AWAITING_INFORMATION', 'DECIDED') LIMIT 100 {skip_locked}"""
_BACKLOG = """
SELECT priority, CAST(not_before AS BIGINT), count(*), count(DISTINCT owner) FROM application
WHERE state = 'PENDING' AND not_before <= {now} GROUP BY 1, 2 ORDER BY 1, 2"""
_ARRIVED = "SELECT count(*) FROM (SELECT 1 FROM application WHERE id >= ? LIMIT ?) AS came"
# A range of the index application_kept.
_DECIDED = """
SELECT count(*) FROM (
  SELECT 1 FROM application WHERE erased_at IS NULL AND state <> 'PENDING' AND state = 'DECIDED' AND updated_at >= ?
  LIMIT ?) AS went"""
# What an applicant has supplied has no place in the queue (0) until it is looked at: it waits since it was changed.
_STANDING = """
SELECT
  MAX(CASE WHEN not_before > {now} THEN 0 WHEN not_before > 0 THEN {now} - not_before ELSE {now} - updated_at END),
  MAX(CASE WHEN original IS NULL THEN {now} - created_at ELSE 0 END),
  COUNT(CASE WHEN lease_until < {now} - ? AND not_before < {now} - ? THEN 1 END),
  (SELECT COUNT(*) FROM application WHERE state = 'PARKED')
FROM application WHERE state = 'PENDING'"""
_RESTING = """
SELECT waiting_for, COUNT(*), MIN(not_before) FROM application
WHERE state = 'PENDING' AND not_before > {now} GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 20"""
_EVENTS = """
SELECT seq, kind, at, actor, details, hash FROM event WHERE application_id = ? AND seq > ? ORDER BY seq LIMIT ?"""

# The newest event of what is parked tells why: whatever else happened to it would have ended its parking.
_PARKED = """
SELECT a.lender, a.id, a.updated_at, a.due_at, e.details FROM application a
JOIN event e ON e.application_id = a.id AND e.seq = a.revision
WHERE a.state = 'PARKED' AND (a.updated_at, a.id) > (?, ?) ORDER BY a.updated_at, a.id LIMIT ?"""

_SHOWN_STATE = "CASE a.state WHEN 'PARKED' THEN 'PENDING' ELSE a.state END"
_FILTERS = {
    "state": _SHOWN_STATE, "outcome": "a.outcome", "grade": "a.grade", "channel": "a.channel",
    "create_time": "a.created_at",
}  # fmt: skip
_WORDS = {
    "state": [state.value for state in State if state.shown is state],
    "outcome": ["APPROVED", "COUNTER_OFFER", "DECLINED"],
    "grade": ["A", "B", "C", "D", "E"],
}
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_OVER = (State.WITHDRAWN.value, State.EXPIRED.value)
_WAITS_FOR_NOTHING: dict[str, object] = {"missing": "[]", "waiting_for": "[]"}
INLINE_MAX = 200
"""Rows that may be read while the loop waits: a fraction of a millisecond."""
UNREADABLE_DUE_S = 86_400.0
"""By when somebody should have looked at an application that cannot be read, seconds."""
KEY_AWAY_S = 10.0
"""After how long an application is tried again whose key is not here, seconds: this replica may have read it by then,
or another one takes it."""
PARKED_ROWS = 500
"""Parked applications that are read at once."""
PARAMETERS_MAX = 5000
"""Parameters of one statement; both databases allow about six times as many."""
log = structlog.get_logger()


class Store:
    """Applications, decisions, evidence and events, on disk when a method returns. All raise DependencyDown."""

    def __init__(self, database: Database, clock: Clock, owner: str, lease_s: float, privacy: Privacy) -> None:
        self._database = database
        self._privacy = privacy
        self._clock = clock
        self._owner = owner
        self._lease_s = lease_s
        self._aged = 0.0

    async def now(self) -> float:
        """The database's time of day, seconds since 1970: one clock for all replicas."""
        ((now_s,),) = await self._database.read("SELECT {now}")
        return float(now_s)

    async def accept(self, batch: Sequence[tuple[New, bool]]) -> list[Stored]:
        """Store new applications, each with (our) first lease where asked for; one answer each, in order.

        One that is there already, under the same lender, client and request_id, is answered as it was stored.
        """
        first = {
            new.id: Happening(1, "accepted", new.created_at, self._owner, {"channel": new.channel}) for new, _ in batch
        }
        hashes = {key: chain("", key, event) for key, event in first.items()}
        covers = {new.id: self._privacy.new(new.lender, new.id) for new, _ in batch}
        look_up_id = self._privacy.look_up_id()

        def script() -> Script[list[Stored]]:
            rows = [
                (n.id, n.lender, n.client_id, n.request_id, covers[n.id].seal(n.payload, "payload"),
                 self._privacy.fingerprint(n.payload_hash), n.priority, n.channel, n.created_at, n.created_at,
                 n.traceparent, covers[n.id].key_id, covers[n.id].wrapped, look_up_id, self._owner if ours else None,
                 self._lease_s if ours else 0.0, hashes[n.id])
                for n, ours in batch
            ]  # fmt: skip
            # By key, as all who store do: two callers who send the same in other orders must not wait for each other.
            rows.sort(key=lambda row: row[1:4])
            inserted = {row[0]: row[1] for row in (yield Statement(_INSERT, rows))}
            yield Statement(
                _INSERT_EVENT, [_event_row(key, first[key], hashes[key]) for key in first if key in inserted]
            )
            subjects = [
                (n.lender, hash_, n.id)
                for n, _ in batch
                if n.id in inserted
                for hash_ in self._privacy.subjects(n.lender, n.numbers)
            ]
            yield Statement(_INSERT_SUBJECT, sorted(subjects))
            old = [n for n, _ in batch if n.id not in inserted]
            found = iter((yield Statement(_FIND, [(n.lender, n.client_id, n.request_id) for n in old])))
            if old:
                yield _SYNC
            answers = []
            for new, ours in batch:
                if new.id in inserted:
                    claim = Claim(
                        new.id, new.lender, 1, 1, 1, 1, hashes[new.id], new.payload, "[]", new.created_at,
                        new.priority, inserted[new.id], new.traceparent, cover=covers[new.id],
                    )  # fmt: skip
                    answers.append(Stored(new.id, new.payload_hash, False, claim if ours else None))
                else:
                    application_id, fingerprint = next(found)
                    same = not fingerprint or self._privacy.is_same(fingerprint, new.payload_hash)
                    answers.append(Stored(application_id, new.payload_hash if same else "", True))
            return answers

        return await self._database.run(script)

    async def claim(self, at_most: int) -> list[Claim]:
        """Lease open applications that nobody holds: most urgent class first, but one in five by age alone."""
        # The rest is carried on: a replica that is nearly full asks for a few at a time.
        self._aged += at_most / AGED_SHARE
        by_age = int(self._aged)
        self._aged -= by_age

        def script() -> Script[list[Row]]:
            rows = yield Statement(_CLAIM_URGENT, [(self._owner, self._lease_s, at_most - by_age)])
            if by_age and len(rows) == at_most - by_age:
                rows += yield Statement(_CLAIM_OLDEST, [(self._owner, self._lease_s, by_age)])
            return rows

        claims: list[Claim] = []
        broken: list[Parked] = []
        later: list[Row] = []
        for row in await self._database.run(script):
            claimed = self._claimed(row)
            if isinstance(claimed, Claim):
                claims.append(claimed)
            elif claimed:
                broken.append(claimed)
            else:
                later.append((KEY_AWAY_S, row[0], row[2], self._owner))
        try:
            if broken:
                await self.settle(broken)
            if later:
                later.sort(key=lambda row: str(row[1]))
                await self._database.run(lambda: _do(Statement(_LATER, later)))
        except DependencyDown as error:  # Their leases end by themselves; the others need not wait for it.
            log.warning("unreadable_not_put_aside", error=str(error))
        return sorted(claims, key=lambda claim: (claim.priority, claim.not_before))

    def _claimed(self, row: Row) -> Claim | Parked | None:
        """A claimed row as the pipeline takes it; it must not hold up the others where it cannot be read.

        Parked where it never can be. None while a key is not here: it is to be tried again.
        """
        application_id, lender, key_id, wrapped = row[0], row[1], row[16], row[17]
        try:
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            payload = cover.unseal(row[7], "payload")
        except DependencyDown as error:
            log.error("application_unreadable", application=application_id, error=str(error))
            return None
        except Unsealable as error:
            log.error("application_unreadable", application=application_id, error=str(error))
            at = self._clock.now().timestamp()
            claim = Claim(*(*row[:7], b"", *row[8:16]))
            return Parked(claim, "open", Broken("unsealable", "Unsealable"), at + UNREADABLE_DUE_S, at)
        return Claim(*(*row[:7], payload, *row[8:16], cover))

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Hold on to leases; the ids that are still ours."""

        def script() -> Script[set[str]]:
            rows = [(self._lease_s, claim.id, claim.fence, self._owner) for claim in _in_order(claims)]
            return {row[0] for row in (yield Statement(_RENEW, rows))}

        return await self._database.run(script)

    async def release(self, claims: Sequence[Claim]) -> None:
        """Give leases back, so that others need not wait for them to end."""

        def script() -> Script[None]:
            yield Statement(_RELEASE, [(claim.id, claim.fence, self._owner) for claim in _in_order(claims)])

        await self._database.run(script)

    async def settle(self, results: Sequence[Result]) -> set[str]:
        """Commit what the pipeline found, where fence and revision still hold; the ids that were."""

        # In the order of ids, and of two leases on one application only the newer: the older is lost whatever it found.
        newest = {r.claim.id: r for r in sorted(results, key=lambda r: (r.claim.id, r.claim.fence))}
        results = list(newest.values())

        def script() -> Script[set[str]]:
            decided = yield from self._decide([r for r in results if isinstance(r, Decided)])
            deferred = yield from self._defer([r for r in results if isinstance(r, Deferred)])
            awaiting = yield from self._await([r for r in results if isinstance(r, Awaiting)])
            parked = yield from self._park([r for r in results if isinstance(r, Parked)])
            ours = decided | deferred | awaiting | parked
            if len(ours) < len(results):
                yield _SYNC  # Settled before, perhaps by us: callers will be told of that.
            return ours

        return await self._database.run(script)

    def _decide(self, results: Sequence[Decided]) -> Script[set[str]]:
        events = {r.claim.id: self._next(r.claim, "decided", r.decided_at, r.details) for r in results}
        rows = [
            (
                r.outcome,
                r.grade,
                r.due_at,
                events[r.claim.id].hash,
                r.decided_at,
                r.claim.id,
                r.claim.fence,
                r.claim.revision,
            )
            for r in results
        ]
        ours = {row[0] for row in (yield Statement(_DECIDE, rows))}
        won = [r for r in results if r.claim.id in ours]
        sealed = [(r.claim, r, self._seals(r.claim)) for r in won]
        yield Statement(
            _INSERT_DECISION,
            [(c.id, c.assessment, c.fence, seal(r.decision, "decision"), r.decided_at) for c, r, seal in sealed],
        )
        yield Statement(
            _INSERT_EVIDENCE,
            [
                (c.id, c.assessment, seal(r.profile, "profile"), seal(r.score, "score"), seal(r.pricing, "pricing"))
                for c, r, seal in sealed
            ],
        )
        yield from _record(events, ours)
        return ours

    def _seals(self, claim: Claim) -> Callable[[bytes, str], bytes]:
        """What seals the content of one assessment."""
        if (cover := claim.cover) is None:
            raise ValueError(f"the claim on {claim.id} says not how its content is kept: no store made it")
        return lambda plain, column: cover.seal(plain, part_of(claim.assessment, column))

    def _await(self, results: Sequence[Awaiting]) -> Script[set[str]]:
        events = {
            r.claim.id: self._next(r.claim, "awaiting_information", r.at, {"missing": _names(r.missing)})
            for r in results
        }
        rows = [
            (
                json.dumps(r.missing),
                r.due_at,
                events[r.claim.id].hash,
                r.at,
                r.claim.id,
                r.claim.fence,
                r.claim.revision,
            )
            for r in results
        ]
        ours = {row[0] for row in (yield Statement(_AWAIT, rows))}
        yield from _record(events, ours)
        return ours

    def _defer(self, results: Sequence[Deferred]) -> Script[set[str]]:
        # An event only when the cause changes: a source that is dead for hours must not fill the history.
        events = {
            r.claim.id: self._next(r.claim, "deferred", r.at, {"waiting_for": ",".join(r.waiting_for)})
            for r in results
            if json.dumps(r.waiting_for) != r.claim.waiting_for
        }
        rows = []
        for r in results:
            event = events.get(r.claim.id)
            rows.append(
                (json.dumps(r.waiting_for), 1 if r.overloaded else 0, r.retry_s,
                 1 if r.broke else 0, 1 if event else 0, event.hash if event else r.claim.event_hash, r.at,
                 r.claim.id, r.claim.fence, r.claim.revision)
            )  # fmt: skip
        ours = {row[0] for row in (yield Statement(_DEFER, rows))}
        yield from _record(events, ours)
        return ours

    def _park(self, results: Sequence[Parked]) -> Script[set[str]]:
        if not results:
            return set()
        events = {
            r.claim.id: self._next(r.claim, "parked", r.at, {
                "cause": r.broken.cause, "stage": r.stage, "error_type": r.broken.error_type,
                "faults": str(r.claim.faults + 1), "trace_id": r.claim.trace_id,
            })
            for r in results
        }  # fmt: skip
        rows = [(r.due_at, events[r.claim.id].hash, r.at, r.claim.id, r.claim.fence, r.claim.revision) for r in results]
        ours = {row[0] for row in (yield Statement(_PARK, rows))}
        yield from _record(events, ours)
        return ours

    async def parked(self, page_size: int, page_token: str, cause: str) -> tuple[list[ParkedView], str]:
        """A page of what is parked, longest first, and the token for the next ('' at the end).

        cause  only those of this cause; '': all. Raises InvalidRequest for a token that is not ours.
        """
        tag = f"parked|{cause}"
        after: tuple[float, str] = _open_token(page_token, tag) if page_token else (float("-inf"), "")
        found: list[ParkedView] = []
        while len(found) <= page_size:
            rows = await self._database.scan(_PARKED, (*after, PARKED_ROWS))
            views = [ParkedView(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in rows]
            found += [view for view in views if cause in ("", view.details.get("cause"))]
            if len(rows) < PARKED_ROWS:
                break
            after = (rows[-1][2], rows[-1][1])
        page = found[:page_size]
        token = _make_token(page[-1].parked_at, page[-1].id, tag) if len(found) > page_size else ""
        return page, token

    async def change(
        self,
        lender: str,
        application_id: str,
        request_id: str,
        said: Mapping[str, str],
        kind: str,
        details: dict[str, str],
        apply: Apply,
    ) -> None:
        """Change an application once per request_id; asking again changes nothing.

        said   what was asked for, by field: a second request of the same id must say the same.
        apply  what it needs of payload and decision it reads: one that can be read no more can still be withdrawn.
        Raises NotFound; RequestIdConflict when the request_id was used for something else; what `apply` raises.
        """
        at = self._clock.now().timestamp()

        def script() -> Script[None]:
            rows = yield Statement(_LOCK, [(application_id, lender)])
            if not rows:
                raise unknown(lender, application_id)
            revision, before, state, payload, original, key_id, wrapped, erased_at = rows[0]
            used = yield Statement(_FIND_REQUEST, [(application_id, request_id)])
            if used:
                self._require_same(request_id, json.loads(used[0][0]), {"kind": kind, **said})
                yield _SYNC
                return
            if erased_at is not None:
                raise erased(application_id, erased_at)
            decisions = yield Statement(
                "SELECT d.payload, d.assessment FROM decision d JOIN application a ON a.id = d.application_id"
                " AND a.assessment = d.assessment WHERE a.id = ?",
                [(application_id,)],
            )

            def read(stored: bytes, column: str) -> bytes:
                with _readable(lender, application_id):
                    return self._privacy.stored(lender, application_id, key_id, wrapped).unseal(stored, column)

            def decision() -> bytes | None:
                return read(decisions[0][0], part_of(decisions[0][1], "decision")) if decisions else None

            columns = apply(State(state), lambda: read(payload, "payload"), decision)
            if isinstance(supplied := columns.get("payload"), bytes):
                cover = self._privacy.stored(lender, application_id, key_id, wrapped)
                columns["payload"] = cover.seal(supplied, "payload")
                if original is None:
                    # A repeated submit is compared with what was submitted, not with what was supplied since.
                    columns["original"] = cover.seal(read(payload, "payload"), "original")
            # A person's words, such as why something was released, may name another person; events are kept for years.
            told = {name: mask(text) for name, text in details.items()}
            yield from self._update(application_id, revision, before, columns, kind, at, told)
            prints = {name: self._privacy.fingerprint(value) for name, value in said.items()}
            used_for = json.dumps({"kind": kind, **prints}, sort_keys=True)
            yield Statement(_INSERT_REQUEST, [(application_id, request_id, used_for)])

        await self._database.run(script)

    def _require_same(self, request_id: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Raise RequestIdConflict where a request_id was used for something else; `before` as it is stored."""
        fields = sorted(
            name
            for name in before.keys() | now.keys()
            if name not in before or name not in now or not self._privacy.is_same(before[name], now[name])
        )
        if fields:
            raise RequestIdConflict(
                f"request_id {request_id} was used for another change of this application, {before['kind']};"
                f" what differs: {', '.join(fields)}",
                fields=", ".join(fields),
            )

    def _update(
        self,
        application_id: str,
        revision: int,
        before: str,
        columns: dict[str, object],
        kind: str,
        at: float,
        details: dict[str, str],
    ) -> Script[None]:
        event = Happening(revision + 1, kind, at, self._owner, details)
        hash_ = chain(before, application_id, event)
        if columns.get("state") in _OVER:
            columns = columns | _WAITS_FOR_NOTHING
        names = ", ".join(f"{name} = ?" for name in columns)
        yield Statement(
            f"UPDATE application SET {names}, owner = NULL, lease_until = NULL, revision = revision + 1,"
            " event_hash = ?, updated_at = ? WHERE id = ? AND revision = ?",
            [(*columns.values(), hash_, at, application_id, revision)],
        )
        yield Statement(_INSERT_EVENT, [_event_row(application_id, event, hash_)])

    async def expire_overdue(self) -> int:
        """Expire up to 100 applications whose due time has passed; how many."""
        at = self._clock.now().timestamp()

        def script() -> Script[int]:
            rows = yield Statement(_OVERDUE)
            for application_id, revision, before, state in rows:
                columns: dict[str, object] = {"state": State.EXPIRED.value, "due_at": None}
                yield from self._update(application_id, revision, before, columns, "expired", at, {"from": state})
            return len(rows)

        return await self._database.run(script)

    async def get(self, lender: str, application_id: str) -> Snapshot:
        """One application. Raises NotFound, WrongState where it can no longer be read."""
        return self._snapshot(await self._one(lender, application_id))

    async def changed(self, lender: str, application_id: str) -> Snapshot:
        """One application as a change left it; without its content where that cannot be read. Raises NotFound."""
        try:
            return await self.get(lender, application_id)
        except (WrongState, DependencyDown):
            row = await self._one(lender, application_id)
            return self._unsealed((*row[:2], b"", *row[3:13], None, *row[14:16], None, None))

    async def _one(self, lender: str, application_id: str) -> Row:
        rows = await self._database.read(_SNAPSHOT + "WHERE a.id = ? AND a.lender = ?", (application_id, lender))
        if not rows:
            raise unknown(lender, application_id)
        return rows[0]

    async def submitted(self, lender: str, application_id: str) -> bytes:
        """The payload as it was first submitted. Raises NotFound, WrongState where it can no longer be read."""
        sql = "SELECT payload, original, key_id, data_key FROM application WHERE id = ? AND lender = ?"
        rows = await self._database.read(sql, (application_id, lender))
        if not rows:
            raise unknown(lender, application_id)
        payload, original, key_id, wrapped = rows[0]
        with _readable(lender, application_id):
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            return cover.unseal(payload, "payload") if original is None else cover.unseal(original, "original")

    async def get_many(self, ids: Sequence[str]) -> dict[str, Snapshot]:
        """Those of the given applications that exist and can be read now; `get` says why another cannot."""
        if not ids:
            return {}
        marks = ", ".join("?" * len(ids))
        rows = await self._database.read(_SNAPSHOT + f"WHERE a.id IN ({marks})", tuple(ids))
        found = {}
        for row in rows:
            try:
                found[row[0]] = self._snapshot(row)
            except (WrongState, DependencyDown) as error:
                log.error("application_unreadable", application=row[0], error=str(error))
        return found

    async def revisions(self, ids: Sequence[str]) -> dict[str, int]:
        """Newest revision of each, for watchers."""
        found: dict[str, int] = {}
        for start in range(0, len(ids), PARAMETERS_MAX):
            some = ids[start : start + PARAMETERS_MAX]
            marks = ", ".join("?" * len(some))
            read = self._database.read if len(some) <= INLINE_MAX else self._database.scan
            rows = await read(f"SELECT id, revision FROM application WHERE id IN ({marks})", some)
            found.update((row[0], row[1]) for row in rows)
        return found

    async def page(
        self, lender: str, page_size: int, page_token: str, filter_: str, order_by: str
    ) -> tuple[list[Snapshot], str]:
        """A page and the token for the next ('' at the end). Raises InvalidRequest for filter, order or token."""
        down = order_by in ("", "create_time desc")
        conditions, params = parse_filter(filter_)
        conditions.insert(0, "a.lender = ?")
        params.insert(0, lender)
        tag = f"{lender}|{filter_}|{down}"
        if page_token:
            created_at, application_id = _open_token(page_token, tag)
            conditions.append(f"(a.created_at, a.id) {'<' if down else '>'} (?, ?)")
            params += [created_at, application_id]
        way = "DESC" if down else "ASC"
        sql = f"{_SNAPSHOT} WHERE {' AND '.join(conditions)} ORDER BY a.created_at {way}, a.id {way} LIMIT ?"
        rows = await self._database.scan(sql, (*params, page_size + 1))
        shown = rows[:page_size]
        token = _make_token(shown[-1][11], shown[-1][0], tag) if len(rows) > page_size else ""
        page = []
        for row in shown:
            try:
                page.append(self._snapshot(row))
            except WrongState as error:  # One that cannot be read must not hide the others.
                log.error("application_unreadable", application=row[0], error=str(error))
        return page, token

    async def events(self, lender: str, application_id: str) -> list[Happening]:
        """The whole history, oldest first. Raises NotFound."""
        if not await self._database.read(
            "SELECT 1 FROM application WHERE id = ? AND lender = ?", (application_id, lender)
        ):
            raise unknown(lender, application_id)
        rows = await self._database.read(_EVENTS, (application_id, 0, 100_000))
        return [Happening(r[0], r[1], r[2], r[3], json.loads(r[4]), r[5]) for r in rows]

    async def decision_with_evidence(
        self, lender: str, application_id: str, assessment: int
    ) -> tuple[bytes, bytes, bytes, bytes] | None:
        """(decision, profile, score, pricing) as stored; the newest for assessment 0; None where there is none.

        Raises NotFound, WrongState where it can no longer be read.
        """
        await self.get(lender, application_id)
        rows = await self._database.read(
            "SELECT d.payload, e.profile, e.score, e.pricing, d.assessment, a.key_id, a.data_key FROM decision d"
            " JOIN evidence e ON e.application_id = d.application_id AND e.assessment = d.assessment"
            " JOIN application a ON a.id = d.application_id"
            " WHERE d.application_id = ? AND (? = 0 OR d.assessment = ?) ORDER BY d.assessment DESC LIMIT 1",
            (application_id, assessment, assessment),
        )
        if not rows:
            return None
        *blobs, decided, key_id, wrapped = rows[0]
        with _readable(lender, application_id):
            cover = self._privacy.stored(lender, application_id, key_id, wrapped)
            decision, profile, score, pricing = (
                cover.unseal(blob, part_of(decided, column)) for blob, column in zip(blobs, PARTS, strict=True)
            )
        return decision, profile, score, pricing

    async def backlog(self) -> list[tuple[int, int, int, int]]:
        """Applications that could be worked on now and are not decided, in the order of their turn.

        Rows of (priority, second in which they came, how many, by how many replicas they are held).
        """
        return [(row[0], row[1], row[2], row[3]) for row in await self._database.scan(_BACKLOG)]

    def _snapshot(self, row: Row) -> Snapshot:
        with _readable(row[1], row[0]):
            return self._unsealed(row)

    def _unsealed(self, row: Row) -> Snapshot:
        cover = self._privacy.stored(row[1], row[0], row[16], row[17])
        # An erased decision is an empty row, which keeps it the only one of its assessment.
        decision = cover.unseal(row[13], part_of(row[8], "decision")) if row[13] else None
        return Snapshot(
            id=row[0], lender=row[1], payload=cover.unseal(row[2], "payload"), state=State(row[3]), not_before=row[4],
            waiting_for=tuple(json.loads(row[5])), missing=tuple(json.loads(row[6])), due_at=row[7], assessment=row[8],
            accepted_offer=row[9], revision=row[10], created_at=row[11], updated_at=row[12], decision=decision,
            priority=row[14], erased_at=row[15],
        )  # fmt: skip

    async def arrived(self, since: float, at_most: int) -> int:
        """How many were accepted since then, seconds since 1970, counting no further than `at_most`.

        A range of the primary key: ids begin with the time at which they were made.
        """
        milliseconds = f"{int(since * 1000):012x}"
        first = f"{milliseconds[:8]}-{milliseconds[8:]}-"
        rows = await self._database.scan(_ARRIVED, (first, at_most))
        return int(rows[0][0])

    async def decided(self, since: float, at_most: int) -> int:
        """How many were decided since then, seconds since 1970, and are so still, counting up to `at_most`."""
        rows = await self._database.scan(_DECIDED, (since, at_most))
        return int(rows[0][0])

    async def standing(self, grace_s: float) -> tuple[float, float, int, int]:
        """How long the first in line waits for its turn, seconds; how long ago the oldest that waits for us alone was
        acknowledged, seconds; how many are due and without an owner since their lease ended, both for `grace_s`; how
        many are parked.
        """
        ((backlog_s, pending_s, unowned, parked),) = await self._database.scan(_STANDING, (grace_s, grace_s))
        # The clock of whoever stored it may be ahead of the database's.
        return max(0.0, backlog_s or 0.0), max(0.0, pending_s or 0.0), unowned, parked

    async def resting(self) -> list[tuple[str, int, float]]:
        """Applications that may not be looked at yet: (what they wait for, how many, when the first may be, seconds
        since 1970), the most frequent first.
        """
        rows = await self._database.scan(_RESTING)
        return [(",".join(json.loads(waiting_for)), count, first_at) for waiting_for, count, first_at in rows]

    def _next(self, claim: Claim, kind: str, at: float, details: dict[str, str]) -> Happening:
        event = Happening(claim.revision + 1, kind, at, self._owner, details)
        return Happening(event.seq, kind, at, self._owner, details, chain(claim.event_hash, claim.id, event))


def unknown(lender: str, application_id: str) -> NotFound:
    """The error for an id that the lender has not."""
    return NotFound(f"there is no {lender}/applications/{application_id}")


@contextlib.contextmanager
def _readable(lender: str, application_id: str) -> Iterator[None]:
    """Raises WrongState where something of the application can no longer be read."""
    try:
        yield
    except Unsealable as error:
        raise WrongState(f"{lender}/applications/{application_id} cannot be read: {error}") from error


def parse_filter(text: str) -> tuple[list[str], list[object]]:
    """SQL conditions and parameters of an AIP-160 filter. Raises InvalidRequest naming the part not understood."""
    conditions: list[str] = []
    params: list[object] = []
    # Values are not shown again: they may be a person's, put into the wrong field.
    for number, part in enumerate(filter(None, re.split(r"\s+AND\s+", text.strip())), start=1):
        match = re.fullmatch(r"(\w+)\s*(=|!=|<=|>=|<|>)\s*(?:\"([^\"]*)\"|([^\s\"]+))", part)
        if not match or match[1] not in _FILTERS or (match[2] not in ("=", "!=") and match[1] != "create_time"):
            # A field's name, as far as it looks like one, is shown: it helps.
            word = re.match(r"[a-z_]{1,20}\b", part)
            which = f"condition {number} ({word[0]})" if word else f"condition {number}"
            known = ", ".join(_FILTERS)
            raise InvalidRequest(("filter", f"{which} cannot be read; known fields are {known}, joined by AND"))
        name, operator = match[1], match[2]
        value = match[3] if match[3] is not None else match[4]
        if name in _WORDS and value not in _WORDS[name]:
            raise InvalidRequest(("filter", f"{name} is one of {', '.join(_WORDS[name])}"))
        if not value.isprintable():
            raise InvalidRequest(("filter", f"{name} has characters that cannot be printed"))
        column = _FILTERS[name]
        # What has no value yet, such as the outcome of what is not decided, is unlike any value.
        conditions.append(f"({column} IS NULL OR {column} != ?)" if operator == "!=" else f"{column} {operator} ?")
        params.append(_seconds(value) if name == "create_time" else value)
    return conditions, params


def _seconds(time: str) -> float:
    try:
        read = dt.datetime.fromisoformat(time)
    except ValueError as error:
        raise InvalidRequest(("filter", 'create_time is no RFC 3339 time, e.g. "2026-11-24T00:00:00Z"')) from error
    return (read if read.tzinfo else read.replace(tzinfo=dt.UTC)).timestamp()


def _make_token(created_at: float, application_id: str, tag: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created_at, application_id, tag]).encode()).decode()


def _open_token(token: str, tag: str) -> tuple[float, str]:
    foreign = InvalidRequest(("page_token", "is not one that this service gave out"))
    try:
        said = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, RecursionError, OverflowError) as error:
        raise foreign from error
    match said:
        case [int() | float() as created_at, str() as application_id, str() as made_for]:
            if made_for != tag:
                raise InvalidRequest(("page_token", "belongs to another lender, filter or order"))
            return _finite(created_at, foreign), application_id
    raise foreign


def _in_order(claims: Sequence[Claim]) -> list[Claim]:
    """By id, as whoever changes several rows takes them: else two transactions can wait for each other's rows."""
    return sorted(claims, key=lambda claim: claim.id)


def _finite(number: float, otherwise: InvalidRequest) -> float:
    try:
        return float(number)
    except OverflowError:
        raise otherwise from None


def _names(missing: Sequence[dict[str, str]]) -> str:
    return ",".join(":".join(filter(None, (m["field"], m["source"]))) for m in missing)


def _do(statement: Statement) -> Script[None]:
    yield statement


def _record(events: dict[str, Happening], ours: set[str]) -> Script[None]:
    yield Statement(_INSERT_EVENT, [_event_row(key, event, event.hash) for key, event in events.items() if key in ours])


def _event_row(application_id: str, event: Happening, hash_: str) -> Row:
    details = _as_json(event.details)
    return (application_id, event.seq, event.kind, event.at, event.actor, details, hash_)
