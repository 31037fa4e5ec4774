"""New applications: stored once for each request, and acknowledged."""

from __future__ import annotations

from collections.abc import Sequence

from loanmesh.runtime.database import Script, Statement
from services.intake.application import Claim, Happening, New, Stored, chain
from services.intake.store.event import INSERT_EVENT, event_row
from services.intake.store.part import SYNC, Part

_INSERT = """
INSERT INTO application (id, lender, client_id, request_id, payload, payload_hash, priority, channel, created_at,
  updated_at, traceparent, key_id, data_key, look_up_id, owner, lease_until, event_hash, not_before,
  fence, attempts, state, waiting_for, missing, assessment, accepted_offer, revision)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, {now} + ?, ?, {now}, 1, 1, 'PENDING', '[]', '[]', 1, '', 1)
ON CONFLICT (lender, client_id, request_id) DO NOTHING RETURNING id, not_before"""
_FIND = "SELECT id, payload_hash FROM application WHERE lender = ? AND client_id = ? AND request_id = ?"
_INSERT_SUBJECT = "INSERT INTO subject (lender, subject_hash, application_id) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"


class Accepting(Part):
    """Stores what clients submit."""

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
            yield Statement(INSERT_EVENT, [event_row(key, first[key], hashes[key]) for key in first if key in inserted])
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
                yield SYNC
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
