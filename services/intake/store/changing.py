"""Changes that a person asks for, once for each request; and applications whose due time has passed."""

from __future__ import annotations

import json
from collections.abc import Mapping

from loanmesh.runtime.database import Script, Statement
from loanmesh.runtime.errors import RequestIdConflict
from loanmesh.runtime.redaction import mask
from services.intake.application import Happening, State, chain, erased
from services.intake.ports import Apply
from services.intake.privacy import part_of
from services.intake.store.event import INSERT_EVENT, event_row
from services.intake.store.part import SYNC, Part
from services.intake.store.reading import readable, unknown

_LOCK = """
SELECT revision, event_hash, state, payload, original, key_id, data_key, erased_at FROM application
WHERE id = ? AND lender = ? {for_update}"""
_FIND_REQUEST = "SELECT said FROM request WHERE application_id = ? AND request_id = ?"
_INSERT_REQUEST = "INSERT INTO request (application_id, request_id, said) VALUES (?, ?, ?)"
_OVERDUE = """
SELECT id, revision, event_hash, state FROM application
WHERE due_at IS NOT NULL AND due_at < {now} AND state IN ('AWAITING_INFORMATION', 'DECIDED') LIMIT 100 {skip_locked}"""
_OVER = (State.WITHDRAWN.value, State.EXPIRED.value)
_WAITS_FOR_NOTHING: dict[str, object] = {"missing": "[]", "waiting_for": "[]"}


class Changing(Part):
    """Changes applications that no pipeline works on, or takes them from the one that does."""

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
                yield SYNC
                return
            if erased_at is not None:
                raise erased(application_id, erased_at)
            decisions = yield Statement(
                "SELECT d.payload, d.assessment FROM decision d JOIN application a ON a.id = d.application_id"
                " AND a.assessment = d.assessment WHERE a.id = ?",
                [(application_id,)],
            )

            def read(stored: bytes, column: str) -> bytes:
                with readable(lender, application_id):
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
        yield Statement(INSERT_EVENT, [event_row(application_id, event, hash_)])

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
