"""Errors, by what the caller should do next. Knows no grpc; `status.py` maps them to status and details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class LoanmeshError(Exception):
    """Anything we tell a caller about. `reason` is a stable UPPER_SNAKE word; the text may change."""

    reason = "ERROR"

    def __init__(self, text: str, **metadata: str) -> None:
        super().__init__(text)
        self.metadata: Mapping[str, str] = metadata


VIOLATIONS_MAX = 20
VIOLATIONS_BYTES_MAX = 1_500
"""Of what is told of one request. An error travels as metadata, three times over, and a client that finds more than
8 to 16 KiB there sees RESOURCE_EXHAUSTED instead."""


class CallerError(LoanmeshError):
    """Change the request."""


class InvalidRequest(CallerError):
    """Fields of the request break rules; each violation is (field, rule). Of many the first are told."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: tuple[str, str]) -> None:
        told = _first(violations)
        super().__init__("; ".join(f"{field}: {rule}" for field, rule in told))
        self.violations: Sequence[tuple[str, str]] = told


def _first(violations: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """As many as can be told; one in any case."""
    size = 0
    told: list[tuple[str, str]] = []
    for field, rule in violations[:VIOLATIONS_MAX]:
        size += len(field.encode()) + len(rule.encode())
        if told and size > VIOLATIONS_BYTES_MAX:
            break
        told.append((field, rule))
    return told


class RequestIdConflict(CallerError):
    """The request_id was used before, for something else."""

    reason = "REQUEST_ID_CONFLICT"


class NotFound(CallerError):
    """There is no such thing."""

    reason = "NOT_FOUND"


class WrongState(CallerError):
    """The state does not allow the change."""

    reason = "WRONG_STATE"


class MissingEvidence(CallerError):
    """What was asked cannot be said without these sources."""

    reason = "MISSING_EVIDENCE"

    def __init__(self, sources: Sequence[str]) -> None:
        super().__init__(f"evidence is missing from: {', '.join(sources)}", sources=",".join(sources))
        self.sources = tuple(sources)


class Unauthenticated(CallerError):
    """Nobody is proven to call; `reason` says what is wrong with the proof."""

    reason = "UNAUTHENTICATED"

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class NotAllowed(CallerError):
    """The caller is known, and may not do this."""

    reason = "NOT_ALLOWED"

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class NotNow(LoanmeshError):
    """Send the same again, later; not before `retry_s` seconds."""

    def __init__(self, text: str, retry_s: float = 1.0, **metadata: str) -> None:
        super().__init__(text, **metadata)
        self.retry_s = retry_s


class Overloaded(NotNow):
    """More work than can be taken; nothing was stored. Metadata `yields_to` names the class of those who are in
    more of a hurry, where they had to queue."""

    reason = "OVERLOADED"


class OverQuota(NotNow):
    """The caller submits more than it may; others are not affected, nothing was stored."""

    reason = "OVER_QUOTA"


class DependencyDown(NotNow):
    """Something we need does not answer; nothing was stored."""

    reason = "DEPENDENCY_DOWN"
