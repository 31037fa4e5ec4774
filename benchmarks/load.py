"""A closed loop: so many calls under way at all times. For what a thing can do, not how it feels when it is full."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.machine import cpu_s, loop_cpu_s
from loanmesh.runtime.clock import Clock


@dataclass
class Measured:
    """A round: how many in how long, and what it cost."""

    count: int = 0
    seconds: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_ms: dict[str, float] = field(default_factory=dict)
    """CPU an item by process."""
    loop_cpu_ms: dict[str, float] = field(default_factory=dict)
    """Of which in the event loop's thread."""
    generator_busy: float = 0.0
    """Share of a core that the generator used. Near 1, it was the limit."""

    @property
    def a_second(self) -> float:
        """Items a second."""
        return self.count / self.seconds

    @property
    def all_cpu_ms(self) -> float:
        """CPU an item, all processes."""
        return sum(self.cpu_ms.values())


@contextmanager
def metered(pids: Mapping[str, int], count: int, clock: Clock) -> Iterator[Measured]:
    """Fills in time and CPU around a block that does `count` items."""
    found = Measured(count)
    before = {name: (cpu_s(pid), loop_cpu_s(pid)) for name, pid in pids.items()}
    own, started = cpu_s(os.getpid()), clock.monotonic()
    yield found
    found.seconds = clock.monotonic() - started
    found.generator_busy = (cpu_s(os.getpid()) - own) / found.seconds
    for name, pid in pids.items():
        found.cpu_ms[name] = (cpu_s(pid) - before[name][0]) / count * 1000
        found.loop_cpu_ms[name] = (loop_cpu_s(pid) - before[name][1]) / count * 1000


async def closed_loop(
    pids: Mapping[str, int], count: int, in_flight: int, one: Callable[[int], Awaitable[object]], clock: Clock
) -> Measured:
    """Run `one` for 0 to count - 1, so many at once."""
    numbers = iter(range(count))
    took_s: list[float] = []

    async def worker() -> None:
        for number in numbers:
            started = clock.monotonic()
            await one(number)
            took_s.append(clock.monotonic() - started)

    with metered(pids, count, clock) as found:
        await asyncio.gather(*(worker() for _ in range(in_flight)))
    took_s.sort()
    found.p50_ms, found.p99_ms = took_s[count // 2] * 1000, took_s[count * 99 // 100] * 1000
    return found


def median(rounds: Sequence[Measured]) -> Measured:
    """The round with the median rate."""
    return sorted(rounds, key=lambda one: one.a_second)[len(rounds) // 2]
