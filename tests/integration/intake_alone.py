"""Intake's servicer without what stands around it: a real store, and nobody who decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from loanmesh.runtime.clock import SystemClock, new_uuid7
from services.intake.application import Claim
from services.intake.servicer import IntakeServicer
from services.intake.store import Store
from services.intake.watch import Watch


class FullWorker:
    """Takes nothing: all waits in the store."""

    busy = False

    def has_room(self, priority: int, more: int) -> bool:
        return False

    def offer(self, claims: Sequence[Claim]) -> None: ...


class OpenDoor:
    """An admission that lets everybody in."""

    def arrived(self, metadata: object, size: str = "") -> tuple[str, float]:
        return "shop", 0.0

    def let_in(self, *_: object) -> None: ...

    def pay(self, *_: object) -> None: ...


class AnEstimate:
    async def seconds(self, priority: int, not_before: float) -> float:
        return 1.0

    def told(self, application_id: str, estimate_s: float) -> None: ...


class Call:
    """A call's context, as far as intake looks at it."""

    def __init__(self) -> None:
        self.acknowledged = 0

    def set_trailing_metadata(self, metadata: object) -> None: ...

    async def send_initial_metadata(self, metadata: object) -> None:
        self.acknowledged += 1


def alone(store: Store, watch: Watch | None = None) -> IntakeServicer:
    """Intake before `store`; `watch` tells who waits of changes."""
    clock, nobody = SystemClock(), cast(Any, None)
    return IntakeServicer(
        store, cast(Any, FullWorker()), watch or Watch(store.revisions, clock, 1.0), cast(Any, AnEstimate()), nobody,
        nobody, {}, clock, lambda: new_uuid7(clock), accepts_waiting_max=10, admission=cast(Any, OpenDoor()),
    )  # fmt: skip
