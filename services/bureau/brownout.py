"""What bureau leaves out while a source is overloaded, in named steps, least harm first. Pure.

serve_cached           an answer that is usable but no longer fresh is served without asking; approvals may rest on it.
skip_optional_sources  a source that policy may do without is not asked at all.

Neither can make a decline: what they leave behind is a stale or missing report, and a decline needs a fresh one.
"""

from __future__ import annotations

import structlog

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.degradation import Load, Step
from loanmesh.runtime.guard import Guard
from services.bureau.settings import BrownoutSettings

SERVE_CACHED = "serve_cached"
SKIP_OPTIONAL = "skip_optional_sources"
log = structlog.get_logger()


class Brownout:
    """One source's steps.

    budget_s  how long a profile waits for its sources; a queue that long is a load of 1.
    """

    def __init__(self, guard: Guard, settings: BrownoutSettings, budget_s: float, clock: Clock) -> None:
        def queue() -> Load:
            wait_s = guard.wait_s_max
            return Load(wait_s / budget_s, f"{guard.waiting} queries wait, the first for {wait_s:.2g} s")

        def queue_or_busy() -> Load:
            if guard.busy_for_s < settings.busy_s:
                return Load(max(1.0, queue().share), "the source says it is too busy")
            return queue()

        self._cached = Step(SERVE_CACHED, guard.name, settings.serve_cached, queue_or_busy, clock, _tell)
        self._skip = Step(SKIP_OPTIONAL, guard.name, settings.skip_optional_sources, queue, clock, _tell)
        self.steps = [self._cached, self._skip] if guard.name in settings.optional else [self._cached]

    def step(self, has_usable: bool) -> str:
        """The step because of which the source is not asked now; empty: ask.

        has_usable  whether there is an answer that is usable, though not fresh.
        """
        if has_usable:
            return SERVE_CACHED if self._cached.check() else ""
        return SKIP_OPTIONAL if self._skip in self.steps and self._skip.check() else ""


def _tell(step: Step, in_force: bool) -> None:
    log.warning("degradation_changed", step=step.name, subject=step.subject, in_force=in_force, cause=step.cause)
