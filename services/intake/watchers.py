"""How many watch streams each caller has open on this replica, so that none takes the room of the others. Pure."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from loanmesh.runtime.errors import OverQuota

RETRY_S = 5.0
"""When one who has too many open may look again: GetApplication answers meanwhile."""


class Watchers:
    """Counts open streams by caller; forgets who has none."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """Streams open now, all callers together."""
        return self._open.total()

    @contextlib.contextmanager
    def watching(self, client: str) -> Iterator[None]:
        """While a stream is open. Raises OverQuota where the caller has as many as it may."""
        if self._open[client] >= self._most:
            text = f"client {client!r} has {self._most} watch streams open here already; GetApplication answers at once"
            raise OverQuota(text, RETRY_S)
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]
