"""When an application that breaks a stage is to blame, and is parked; and when so many do that the stage is. Pure.

One application that breaks scoring at every attempt is a bug with that application, and trying on only costs. When a
good share of all that was looked at breaks scoring, a bad model or policy was published: parking stops, the stage
counts as down, and applications are later, as behind any dead dependency.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from enum import Enum

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.degradation import Load, Step, StepSettings
from services.intake.settings import ParkingSettings

STAGES = ("open", "gather", "score", "price", "conclude", "commit")
"""The way of an application, in the words of events, metrics and `loanmesh parked`."""
STEP = "parking_stopped"
CALM_S = 30.0
"""For how long a stage must break few enough applications before it counts as up again."""
_PASSED = ""


class Blame(Enum):
    """Who is at fault when an application broke a stage."""

    UNKNOWN = "unknown"
    """Try again; this attempt counts."""
    APPLICATION = "application"
    """It breaks the stage at each attempt: park it."""
    STAGE = "stage"
    """Too many break it: the stage is down, and this attempt does not count."""


class Parking:
    """What the newest applications came to, one entry an application, in one replica."""

    def __init__(
        self,
        settings: ParkingSettings,
        clock: Clock,
        dice: random.Random,
        told: Callable[[Step, bool], None] | None = None,
    ) -> None:
        self._settings = settings
        self._dice = dice
        self._newest: OrderedDict[str, str] = OrderedDict()
        self._broken: Counter[str] = Counter()
        rule = StepSettings(enter_at=1.0, leave_below=1.0, calm_s=CALM_S)
        self.steps = {
            stage: Step(STEP, stage, rule, lambda stage=stage: self._load(stage), clock, told)  # type: ignore[misc]
            for stage in STAGES
        }
        """In force while the stage counts as down; shown among the process's degradations."""

    @property
    def due_s(self) -> float:
        """How long a person has to look at a parked application, seconds."""
        return self._settings.due_hours * 3600

    def passed(self, application_ids: Iterable[str]) -> None:
        """These went through all stages."""
        for application_id in application_ids:
            self._note(application_id, _PASSED)

    def broke(self, application_id: str, stage: str, faults: int) -> Blame:
        """One broke a stage, for the `faults`-th time; who is to blame."""
        self._note(application_id, stage)
        if self.steps[stage].check():
            return Blame.STAGE
        return Blame.APPLICATION if faults >= self._settings.attempts_max else Blame.UNKNOWN

    def wait_s(self, faults: int) -> float:
        """How long to wait after the `faults`-th fault, seconds: four times as long each time, with jitter.

        Long enough, taken together, for a bad release to be rolled back meanwhile.
        """
        wait = self._settings.wait_s_first * 4.0 ** min(faults - 1, 10)
        return min(self._settings.wait_s_max, wait) * self._dice.uniform(0.8, 1.2)

    def _note(self, application_id: str, came_to: str) -> None:
        before = self._newest.pop(application_id, None)
        if before:
            self._broken[before] -= 1
        self._newest[application_id] = came_to
        if came_to:
            self._broken[came_to] += 1
        if len(self._newest) > self._settings.window:
            _, oldest = self._newest.popitem(last=False)
            if oldest:
                self._broken[oldest] -= 1

    def _load(self, stage: str) -> Load:
        broken, looked_at = self._broken[stage], len(self._newest)
        # A handful proves nothing: the same few come back again and again where there is little else to do.
        if broken < self._settings.mass_min:
            return Load(0.0, "")
        share = broken / looked_at
        return Load(share / self._settings.mass_share, f"{broken} of the last {looked_at} applications broke it")
