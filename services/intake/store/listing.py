"""Applications in pages: those that a lender asks for, and those that are parked."""

from __future__ import annotations

import base64
import json

import structlog

from loanmesh.runtime.errors import InvalidRequest, WrongState
from services.intake.application import ParkedView, Snapshot
from services.intake.store.filter import parse_filter
from services.intake.store.reading import SNAPSHOT, Reading

# The newest event of what is parked tells why: whatever else happened to it would have ended its parking.
_PARKED = """
SELECT a.lender, a.id, a.updated_at, a.due_at, e.details FROM application a
JOIN event e ON e.application_id = a.id AND e.seq = a.revision
WHERE a.state = 'PARKED' AND (a.updated_at, a.id) > (?, ?) ORDER BY a.updated_at, a.id LIMIT ?"""
PARKED_ROWS = 500
"""Parked applications that are read at once."""
log = structlog.get_logger()


class Listing(Reading):
    """Reads applications a page at a time."""

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
            created_at, application_id = open_token(page_token, tag)
            conditions.append(f"(a.created_at, a.id) {'<' if down else '>'} (?, ?)")
            params += [created_at, application_id]
        way = "DESC" if down else "ASC"
        sql = f"{SNAPSHOT} WHERE {' AND '.join(conditions)} ORDER BY a.created_at {way}, a.id {way} LIMIT ?"
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

    async def parked(self, page_size: int, page_token: str, cause: str) -> tuple[list[ParkedView], str]:
        """A page of what is parked, longest first, and the token for the next ('' at the end).

        cause  only those of this cause; '': all. Raises InvalidRequest for a token that is not ours.
        """
        tag = f"parked|{cause}"
        after: tuple[float, str] = open_token(page_token, tag) if page_token else (float("-inf"), "")
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


def _make_token(created_at: float, application_id: str, tag: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([created_at, application_id, tag]).encode()).decode()


def open_token(token: str, tag: str) -> tuple[float, str]:
    """Where the next page begins: time and id. Raises InvalidRequest where the token is not ours, or not for `tag`."""
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


def _finite(number: float, otherwise: InvalidRequest) -> float:
    try:
        return float(number)
    except OverflowError:
        raise otherwise from None
