"""How many replicas of each service are wanted now, for an autoscaler that asks: the load, and the rules of asking."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.replicas import Load, wanted
from services.intake.estimate import Estimate
from services.intake.settings import ScalerSettings

ACCEPTS = "intake"
DECIDES = "intake-worker"
WINDOW_S = 10.0
"""Over how long arrivals are counted, seconds."""
COUNT_MAX = 50_000
"""Arrivals counted at most: more a second than WINDOW_S of these are taken for as many. Bounds what the count costs."""
SATURATED_S = 2.0
"""A rate tells what replicas can do only while they have more to do: a backlog of so many seconds of all of them."""
FRESH_S = 1.0
"""How long a count serves all who ask."""
OWN_OF_KEDA = {"scalerAddress", "enableTLS", "unsafeSsl", "tlsCertFile", "caCert", "tlsClientCert", "tlsClientKey"}
"""What stands in a trigger's metadata for KEDA itself."""
_NUMBERS = {
    "ratePerReplica": (0.0, 1e6),
    "drainSeconds": (0.0, 86_400.0),
    "utilisation": (0.0, 1.0),
}
"""Our numbers in the metadata: above the first, at most the second."""


@dataclass(frozen=True)
class Ask:
    """What a ScaledObject asks: for which service, and by which figures."""

    service: str
    a_second: float
    """Applications that one replica handles a second, as measured beforehand."""
    drain_s: float
    utilisation: float


def read_ask(metadata: Mapping[str, str], settings: ScalerSettings) -> Ask:
    """The metadata of a trigger, understood. Raises InvalidRequest naming key, value and rule."""
    rates = settings.rates
    wrong = [
        ("scalerMetadata", f"has no {key!r}; known are service, {', '.join(_NUMBERS)}")
        for key in sorted(set(metadata) - OWN_OF_KEDA - set(_NUMBERS) - {"service"})
    ]
    service = metadata.get("service", "")
    if service not in rates:
        said = f"is {service[:50]!r}" if service else "is missing"
        wrong.append(("scalerMetadata.service", f"{said}; it must be one of {', '.join(rates)}"))
    numbers = {}
    for key, (above, most) in _NUMBERS.items():
        if key in metadata:
            numbers[key] = _number(metadata[key])
            if not above < numbers[key] <= most:
                rule = f"is {metadata[key][:50]!r}; it must be a number above {above:g} and at most {most:g}"
                wrong.append((f"scalerMetadata.{key}", rule))
    if wrong:
        raise InvalidRequest(*wrong)
    return Ask(
        service,
        numbers.get("ratePerReplica", rates[service]),
        numbers.get("drainSeconds", settings.drain_s),
        numbers.get("utilisation", settings.utilisation),
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # Outside every range.


class Scaler:
    """Answers from two counts that all who ask share, each at most once a second.

    arrived  how many came since a time of day, seconds since 1970, counting up to a bound; may raise DependencyDown.
    """

    def __init__(
        self,
        estimate: Estimate,
        arrived: Callable[[float, int], Awaitable[int]],
        settings: ScalerSettings,
        clock: Clock,
    ) -> None:
        self._estimate = estimate
        self._arrived = arrived
        self._settings = settings
        self._clock = clock
        self._counting = asyncio.Lock()
        self._arrivals = 0
        self._fresh_until = float("-inf")

    def read(self, metadata: Mapping[str, str]) -> Ask:
        """As `read_ask`, with our defaults."""
        return read_ask(metadata, self._settings)

    async def load(self) -> Load:
        """What waits and what comes in. Raises DependencyDown: KEDA then keeps what it has, or its fallback."""
        async with self._counting:
            if self._clock.monotonic() >= self._fresh_until:
                self._arrivals = await self._arrived(self._clock.now().timestamp() - WINDOW_S, COUNT_MAX)
                self._fresh_until = self._clock.monotonic() + FRESH_S
        return Load(await self._estimate.backlog(), self._arrivals / WINDOW_S)

    async def wanted(self, ask: Ask) -> float:
        """Replicas wanted of the service, not rounded. Raises DependencyDown."""
        load = await self.load()
        decides = ask.service != ACCEPTS
        # What holds up deciding, a source's quota say, is no matter of accepting.
        speed = self._speed(load) if decides else 1.0
        return wanted(load, ask.a_second, ask.drain_s, ask.utilisation, speed=speed, backlog_counts=decides)

    def _speed(self, load: Load) -> float:
        """How fast replicas are today: what this one decides against what it was measured to do beforehand.

        All stages run on the same kind of machine. A replica that does not decide has measured nothing.
        """
        measured = self._estimate.rate()
        if measured is None or load.backlog < SATURATED_S * measured * self._estimate.replicas:
            return 1.0
        return measured / self._settings.rates[DECIDES]

    async def is_active(self) -> bool:
        """Whether there is anything to do. Raises DependencyDown."""
        load = await self.load()
        return load.backlog > 0 or load.arrivals_a_second > 0
