"""Time and ids, handed to whoever needs them, so that the same code runs under a clock of the test's own."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import time
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> dt.datetime:
        """The time of day, UTC, aware."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean something."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let at least `seconds` pass."""
        ...


JUMP = "LOANMESH_CLOCK_JUMP"
"""For fault tests only. `after_s:by_s` in the environment makes the time of day jump: `5:-3600` sets it back an hour
five seconds after the start."""


class SystemClock:
    """The machine's clock; its time of day jumps where LOANMESH_CLOCK_JUMP says so."""

    def __init__(self) -> None:
        after_s, _, by_s = os.environ.get(JUMP, "inf:0").partition(":")
        self._jumps_at = time.monotonic() + float(after_s)
        self._jumps_by = dt.timedelta(seconds=float(by_s))
        self.monotonic = time.monotonic
        """Seconds since some start: asked for two dozen times an application."""

    def now(self) -> dt.datetime:
        """The time of day, UTC, aware."""
        now = dt.datetime.now(dt.UTC)
        return now if time.monotonic() < self._jumps_at else now + self._jumps_by

    async def sleep(self, seconds: float) -> None:
        """Let at least `seconds` pass."""
        await asyncio.sleep(seconds)


class FakeClock:
    """A clock that moves only when told; sleeping moves it at once."""

    def __init__(self, start: dt.datetime = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)) -> None:
        self._now = start
        self._elapsed = 0.0

    def now(self) -> dt.datetime:
        """The time it was moved to."""
        return self._now

    def monotonic(self) -> float:
        """Seconds it was moved by."""
        return self._elapsed

    def advance(self, seconds: float) -> None:
        """Move it on."""
        self._elapsed += seconds
        self._now += dt.timedelta(seconds=seconds)

    async def sleep(self, seconds: float) -> None:
        """Move it on by `seconds`, and let others run."""
        self.advance(seconds)
        await asyncio.sleep(0)


def new_uuid7(clock: Clock) -> str:
    """A UUIDv7 (RFC 9562) in its text form: 48 bits of milliseconds, then 74 random bits. It sorts by time, so that a
    store's index of them grows at its end: else each of a batch would rewrite a page of its own."""
    milliseconds = int(clock.now().timestamp() * 1000)
    random = int.from_bytes(os.urandom(10), "big")
    value = (
        (milliseconds << 80) | (0x7 << 76) | ((random >> 64 & 0xFFF) << 64) | (0b10 << 62) | (random & ((1 << 62) - 1))
    )
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def new_owner(service: str) -> str:
    """A name that no other process, earlier or later, has: a reused host name must not own old leases."""
    return f"{service}-{os.getpid()}-{os.urandom(4).hex()}"


def new_request_id() -> str:
    """A fresh idempotency key."""
    return new_uuid7(SystemClock())
