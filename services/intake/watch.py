"""Who waits for an application hears of its changes: at once when they happen here, within a poll when elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from services.intake.ports import Result


class Watch:
    """One poll for all watchers of a replica, however many there are."""

    def __init__(
        self,
        revisions: Callable[[Sequence[str]], Awaitable[dict[str, int]]],
        clock: Clock,
        poll_s: float,
        report: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        self._revisions = revisions
        self._clock = clock
        self._poll_s = poll_s
        self._report = report
        self._left = False
        # In the order they came: told in the same order on every run of a seed, and nobody last by chance.
        self._watchers: dict[str, dict[Watching, None]] = {}
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

    def leave(self) -> None:
        """This replica is about to end: who waits here is told so, and asks another one."""
        self._left = True
        for watchers in self._watchers.values():
            for watching in watchers:
                watching.tell(None)

    def changed(self, ids: Iterable[str]) -> None:
        """These have just changed."""
        for key in ids:
            for watching in self._watchers.get(key, ()):
                watching.tell(None)

    def settled(self, results: Mapping[str, Result]) -> None:
        """These were just committed here: who waits for them need not read them again."""
        for key, result in results.items():
            for watching in self._watchers.get(key, ()):
                watching.tell(result)

    def __call__(self, application_id: str) -> Watching:
        """A watch to hold open with `with` while reading and waiting in turns."""
        return Watching(self, application_id)

    async def _rung(self, bell: asyncio.Event) -> None:
        """Return when it rings, and let it ring anew."""
        if not self._left:
            await bell.wait()
        if self._left:
            raise DependencyDown("this replica is leaving; ask again", retry_s=0.1)
        bell.clear()

    async def _poll_forever(self) -> None:
        before: set[str] = set()
        while True:
            await self._clock.sleep(self._poll_s)
            # Only who has waited for a whole poll: most are told of their change by this replica before that.
            polled = [key for key in self._watchers if key in before]
            before = set(self._watchers)
            try:
                revisions = await self._revisions(polled) if polled else {}
            except Exception as error:  # noqa: BLE001  Watchers wait on; the poll after the database's return tells them.
                self._report("watch_failed", error_type=type(error).__name__)
                continue
            for key, revision in revisions.items():
                if key in self._watchers and self._seen.get(key) != revision:
                    self._seen[key] = revision
                    self.changed([key])


class Watching:
    """One watcher. Each has its own bell: one that is cleared by another's reading would be a change missed. Only those
    of a `WatchingAll` share one, since they are read together."""

    def __init__(self, watch: Watch, application_id: str, bell: asyncio.Event | None = None) -> None:
        self._watch = watch
        self._id = application_id
        self._bell = bell or asyncio.Event()
        self._result: Result | None = None
        self.told = False
        """Whether something happened since the last `take`."""

    def __enter__(self) -> Watching:
        self._watch._watchers.setdefault(self._id, {})[self] = None
        return self

    def __exit__(self, *_: object) -> None:
        watchers = self._watch._watchers[self._id]
        watchers.pop(self, None)
        if not watchers:
            del self._watch._watchers[self._id]
            self._watch._seen.pop(self._id, None)

    def tell(self, result: Result | None) -> None:
        """Something happened; `result` is what, where this replica committed it."""
        self._result = result
        self.told = True
        self._bell.set()

    def take(self) -> Result | None:
        """What was committed by the last change; None where it is to be read."""
        self.told = False
        return self._result

    async def next_change(self) -> Result | None:
        """Return at the next change, or one since the last call: what was committed; None where that is to be read.

        Raises DependencyDown when this replica is about to end.
        """
        await self._watch._rung(self._bell)
        return self.take()


class WatchingAll:
    """Watches several at once, for one who answers for all of them. Hold open with `with`."""

    def __init__(self, watch: Watch, ids: Iterable[str]) -> None:
        self._watch = watch
        self._bell = asyncio.Event()
        self._of = {key: Watching(watch, key, self._bell) for key in ids}

    def __enter__(self) -> WatchingAll:
        for watching in self._of.values():
            watching.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for watching in self._of.values():
            watching.__exit__()

    def tell_again(self, ids: Iterable[str]) -> None:
        """These have changed, and nobody has looked yet."""
        for key in ids:
            self._of[key].tell(None)

    async def next_changes(self) -> dict[str, Result | None]:
        """Those that changed, as `Watching.next_change` says it of one. Raises the same."""
        await self._watch._rung(self._bell)
        return {key: watching.take() for key, watching in self._of.items() if watching.told}
