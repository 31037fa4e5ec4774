"""How much one caller may submit, so that none takes the room of the others. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

CLIENTS_MAX = 10_000
"""Callers remembered; the one not heard of for the longest is forgotten, and has its whole burst again."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much one caller may submit.

    a_second  applications a second; 0: as many as it likes.
    burst     how many at once after a rest.
    """

    a_second: float
    burst: int


class Quota:
    """A token bucket a caller. A batch that exceeds what is left passes once, and is paid for before the next."""

    def __init__(self, a_second: float, burst: int, by_client: Mapping[str, Allowance] = MappingProxyType({})) -> None:
        """See Allowance. Clients named in `by_client` have values of their own."""
        self._others = Allowance(a_second, burst)
        self._by_client = by_client
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allowance(self, client: str) -> Allowance:
        """What the client may."""
        return self._by_client.get(client, self._others)

    def take(self, client: str, count: int, now: float) -> float:
        """0 where the caller may submit so many now, which are then counted; else the seconds until it may. `now` is in
        monotonic seconds."""
        allowance = self.allowance(client)
        if not allowance.a_second:
            return 0.0
        burst = float(allowance.burst)
        left, at = self._left.pop(client, (burst, now))
        left = min(burst, left + (now - at) * allowance.a_second)
        allowed = left > 0
        self._left[client] = (left - count if allowed else left, now)
        if len(self._left) > CLIENTS_MAX:
            self._left.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / allowance.a_second
