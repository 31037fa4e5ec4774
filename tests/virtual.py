"""An event loop on virtual time: sleeping takes none, so that minutes of traffic fit into a unit test."""

from __future__ import annotations

import asyncio
import datetime as dt
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
START = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)


class _Selector(selectors.DefaultSelector):
    """Where a loop would wait for time to pass, lets it pass at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen")
        if not ready:
            self.now += timeout or 0.0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time moves when all its tasks wait, to the moment at which the next one goes on."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds since the start."""
        return self._virtual.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]  # In this loop nothing takes time, so nothing needs a thread.
        """Run it at once."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  Handed to whoever awaits it.
            future.set_exception(error)
        return future


class VirtualClock:
    """The clock of the loop that runs."""

    def now(self) -> dt.datetime:
        """The time of day, UTC."""
        return START + dt.timedelta(seconds=self.monotonic())

    def monotonic(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        await asyncio.sleep(seconds)  # noqa: TID251  This is a clock.


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
