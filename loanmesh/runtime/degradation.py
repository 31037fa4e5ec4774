"""Degradation steps: named concessions, taken and given up by rules under a clock. Pure.

A step is in force while its load is high, and for a while after: left too soon, it would let the load back in and be
taken again. Nobody restarts anything; whoever asks next finds the step as the load and the clock now say.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field, model_validator

from loanmesh.runtime.clock import Clock


class StepSettings(BaseModel, frozen=True, extra="forbid"):
    """When a step is taken, and when it is given up."""

    enter_at: Annotated[float, Field(gt=0)]
    """Load from which it is taken, at once."""
    leave_below: Annotated[float, Field(gt=0)]
    """Load that must be undercut for it to be given up; at most `enter_at`."""
    calm_s: Annotated[float, Field(ge=0)] = 2.0
    """For how long without a break it must be undercut, seconds."""

    @model_validator(mode="after")
    def _ordered(self) -> StepSettings:
        if self.leave_below > self.enter_at:
            raise ValueError("leave_below must not be above enter_at, or the step would flap")
        return self


class Load(NamedTuple):
    """How hard something is pressed: 1 is as much as it can bear; and in words, for a person."""

    share: float
    cause: str


class Step:
    """One step about one subject.

    name     as decisions record it, e.g. `serve_cached`.
    subject  what it is about, e.g. `court`.
    load     read whenever somebody checks.
    told     called with whether it is now in force, when that changes.
    """

    def __init__(
        self,
        name: str,
        subject: str,
        settings: StepSettings,
        load: Callable[[], Load],
        clock: Clock,
        told: Callable[[Step, bool], None] | None = None,
    ) -> None:
        self.name = name
        self.subject = subject
        self._settings = settings
        self._load = load
        self._clock = clock
        self._told = told
        self._calm_since: float | None = None
        self.in_force = False
        """Whether it was in force when somebody last checked."""
        self.since: dt.datetime | None = None
        """When it was last taken, UTC; None: never."""
        self.cause = ""
        """Why it was last taken, for a person."""

    def check(self) -> bool:
        """Whether it is in force now, by the load and the clock of now."""
        load = self._load()
        if load.share >= self._settings.enter_at:
            self._calm_since = None
            if not self.in_force:
                self.since, self.cause = self._clock.now(), load.cause
                self._set(True)
        elif self.in_force and load.share < self._settings.leave_below:
            now = self._clock.monotonic()
            self._calm_since = now if self._calm_since is None else self._calm_since
            if now - self._calm_since >= self._settings.calm_s:
                self._set(False)
        else:
            self._calm_since = None
        return self.in_force

    def _set(self, in_force: bool) -> None:
        self.in_force = in_force
        self._calm_since = None
        if self._told:
            self._told(self, in_force)
