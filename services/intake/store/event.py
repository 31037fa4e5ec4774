"""The history of an application, as rows."""

from __future__ import annotations

import json

from loanmesh.runtime.database import Row
from services.intake.application import Happening

INSERT_EVENT = "INSERT INTO event (application_id, seq, kind, at, actor, details, hash) VALUES (?, ?, ?, ?, ?, ?, ?)"
_as_json = json.JSONEncoder(ensure_ascii=False).encode


def event_row(application_id: str, event: Happening, hash_: str) -> Row:
    """The parameters of INSERT_EVENT."""
    details = _as_json(event.details)
    return (application_id, event.seq, event.kind, event.at, event.actor, details, hash_)
