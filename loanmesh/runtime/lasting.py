"""Work that goes on in the background for as long as the process: one round that fails must not be the last."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

import structlog

log = structlog.get_logger()


class Lasting(AbstractContextManager[None]):
    """Put around each round of a loop, but not around its pause: what a round raises is logged, and the loop goes on.

    A cause is logged when it begins, not at each round that it lasts. Cancellation passes.
    """

    def __init__(self, work: str) -> None:
        self._work = work
        self._cause: tuple[str, str, int] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None:
            self._cause = None
            return False
        # Whatever it is: a task that ends by an error nobody waits for is dead, and nothing tells of it.
        if not isinstance(error, Exception):
            return False
        cause = (type(error).__name__, *_raised_at(trace))
        if cause != self._cause:
            self._cause = cause
            log.error("round_failed", work=self._work, error_type=cause[0], exc_info=error)
        return True


def _raised_at(trace: TracebackType | None) -> tuple[str, int]:
    """File and line; texts of errors may differ each time."""
    while trace and trace.tb_next:
        trace = trace.tb_next
    return (trace.tb_frame.f_code.co_filename, trace.tb_lineno) if trace else ("", 0)
