"""Who waits for an application hears of its changes: at once when they happen here, within a poll when elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown


class Watch:
    """One poll for all watchers of a replica, however many there are."""

    def __init__(
        self, revisions: Callable[[Sequence[str]], Awaitable[dict[str, int]]], clock: Clock, poll_s: float
    ) -> None:
        self._revisions = revisions
        self._clock = clock
        self._poll_s = poll_s
        self._watched: Counter[str] = Counter()
        self._events: dict[str, asyncio.Event] = {}
        self._seen: dict[str, int] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to poll."""
        self._task = asyncio.create_task(self._poll_forever())

    async def stop(self) -> None:
        """End."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def changed(self, ids: Iterable[str]) -> None:
        """These have just changed."""
        for key in ids:
            if event := self._events.get(key):
                event.set()

    def __call__(self, application_id: str) -> _Watching:
        """A watch to hold open with `with` while reading and waiting in turns."""
        return _Watching(self, application_id)

    async def _poll_forever(self) -> None:
        while True:
            await self._clock.sleep(self._poll_s)
            try:
                revisions = await self._revisions(list(self._watched))
            except DependencyDown:
                continue  # Watchers wait on; the poll after the database's return tells them.
            for key, revision in revisions.items():
                if self._seen.get(key) != revision:
                    self._seen[key] = revision
                    self.changed([key])


class _Watching:
    def __init__(self, watch: Watch, application_id: str) -> None:
        self._watch = watch
        self._id = application_id

    def __enter__(self) -> _Watching:
        self._watch._watched[self._id] += 1
        self._event = self._watch._events.setdefault(self._id, asyncio.Event())
        return self

    def __exit__(self, *_: object) -> None:
        watch = self._watch
        watch._watched[self._id] -= 1
        if not watch._watched[self._id]:
            del watch._watched[self._id], watch._events[self._id]
            watch._seen.pop(self._id, None)

    async def next_change(self) -> None:
        """Return at the next change, or at one since the last call."""
        await self._event.wait()
        self._event.clear()
