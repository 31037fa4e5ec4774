"""What a caller may filter applications by, as SQL (pure)."""

from __future__ import annotations

import datetime as dt
import re

from loanmesh.runtime.errors import InvalidRequest
from services.intake.application import State

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
