"""How many replicas served while something was done to them: counted at every change that the API server tells of."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing, suppress

from lab.kube.cluster import Cluster, Data, Refused

NAME = "app.kubernetes.io/name"
SIGHT_WITHIN_S = 30.0


def is_ready(pod: Data) -> bool:
    """Whether it serves: ready, and not on its way out."""
    conditions = (pod.get("status") or {}).get("conditions") or ()
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


class Watched:
    """The fewest ready replicas of each service since all of them were in sight.

    present  how many are ready when the watch begins, by the service's name.
    needed   the fewest that there may be.
    """

    def __init__(self, present: Mapping[str, int], needed: Mapping[str, int]) -> None:
        self._present, self._needed = present, needed
        self._ready: dict[str, str] = {}
        self.fewest: dict[str, int] = {}

    @property
    def ready(self) -> set[str]:
        """Those that serve now, by uid, as far as the watch has told."""
        return set(self._ready)

    @property
    def all_in_sight(self) -> bool:
        """Whether every replica that was there has been seen: a watch begins with one event each."""
        return set(self.fewest) == set(self._present)

    def see(self, kind: str, pod: Data) -> None:
        """One event of a watch."""
        name, uid = pod["metadata"].get("labels", {}).get(NAME, ""), pod["metadata"]["uid"]
        if name in self._present and kind != "DELETED" and is_ready(pod):
            self._ready[uid] = name
        else:
            self._ready.pop(uid, None)
        counts = Counter(self._ready.values())
        for service, present in self._present.items():
            if service in self.fewest or counts[service] >= present:
                self.fewest[service] = min(self.fewest.get(service, present), counts[service])

    @property
    def broken(self) -> list[str]:
        """Where there were fewer, in words."""
        return [
            f"{service}: {self.fewest.get(service, 0)} ready for a while, at least {least} are to be"
            for service, least in self._needed.items()
            if self.fewest.get(service, 0) < least
        ]


class Watching:
    """Keeps a `Watched` fed while the block runs."""

    def __init__(self, cluster: Cluster, namespace: str, present: Mapping[str, int], needed: Mapping[str, int]) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._seen = Watched(present, needed)
        self._all_in_sight = asyncio.Event()

    async def __aenter__(self) -> Watched:
        self._task = asyncio.create_task(self._follow())
        # What is done begins when everybody is in sight.
        waiting = asyncio.ensure_future(self._all_in_sight.wait())
        await asyncio.wait((waiting, self._task), timeout=SIGHT_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not self._seen.all_in_sight:
            self._task.cancel()
            raise Refused("the watch of pods does not show all replicas that are ready")
        return self._seen

    async def __aexit__(self, *_: object) -> None:
        if self._task.done():
            raise Refused("the watch of pods ended early: what happened meanwhile is not known")
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _follow(self) -> None:
        async with aclosing(self._cluster.watch("pods", self._namespace)) as events:
            async for kind, pod in events:
                self._seen.see(kind, pod)
                if self._seen.all_in_sight:
                    self._all_in_sight.set()
