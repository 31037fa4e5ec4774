"""Forgetting: a subject who asks, and applications whose time is over. What must be kept is kept, and says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.lasting import Lasting
from services.intake.application import State
from services.intake.keeping import DONE, Held, Keeping
from services.intake.retention import DAY_S, Keep, RetentionSettings, Standing, must_keep, over

AT_ONCE_MAX = 500
"""Applications of one subject that are erased, or told of, in one call, as the contract says."""
ROWS_MAX = 100
"""Applications erased in one transaction: a few milliseconds."""
ASKED = "asked"
"""The rule by which content goes because its subject asked (PIPL 47)."""


@dataclass(frozen=True)
class Fate:
    """What became of one application: erased now or before, or kept by a rule."""

    id: str
    erased: bool
    before: bool = False
    keep: Keep | None = None


class Forgets(Protocol):
    """Whoever caches evidence about subjects."""

    async def erase_subject(self, lender: str, kind: int, number: str, *, only_count: bool) -> int:
        """Delete what is cached of a subject; how many answers. Raises DependencyDown."""
        ...


class Eraser:
    """Erases by subject."""

    def __init__(self, keeping: Keeping, evidence: Forgets, settings: RetentionSettings, clock: Clock) -> None:
        self._keeping = keeping
        self._evidence = evidence
        self._settings = settings
        self._clock = clock

    async def erase(self, lender: str, kind: int, number: str, *, only_look: bool) -> tuple[Sequence[Fate], bool, int]:
        """(What became of each application, oldest first, whether there are more to erase, cached answers deleted).

        Safe to repeat. Raises DependencyDown; what was erased so far stays erased.
        """
        answers = await self._evidence.erase_subject(lender, kind, number, only_count=only_look)
        fates: list[Fate] = []
        erased, after = 0, ""
        # Past all that are kept, however many: a repeated call would only come to the same ones again.
        while erased < AT_ONCE_MAX and (page := await self._keeping.of_subject(lender, number, after, ROWS_MAX)):
            after = page[-1].id
            found = {one.id: self._fate(one) for one in page}
            going = [fate.id for fate in found.values() if fate.erased and not fate.before]
            if going and not only_look:
                # One may have changed since it was looked at, such as by its offer being accepted.
                now = await self._keeping.erase(going, ASKED, self._keep)
                found |= {id_: Fate(id_, now.get(id_) is None, id_ not in now, now.get(id_)) for id_ in going}
            fates += found.values()
            erased += len(going)
        return fates, erased >= AT_ONCE_MAX, answers

    def _fate(self, one: Held) -> Fate:
        if one.erased_at is not None:
            return Fate(one.id, erased=True, before=True)
        keep = self._keep(one.standing)
        return Fate(one.id, erased=keep is None, keep=keep)

    def _keep(self, standing: Standing) -> Keep | None:
        return must_keep(standing, self._settings, self._clock.now().timestamp())


class Upkeep:
    """The passes over all applications: sealed anew after a rotation, erased when their time is over, their subjects
    forgotten.

    Takes a tenth of the time at most, in transactions of a few milliseconds; one replica at a time.
    """

    def __init__(
        self,
        keeping: Keeping,
        settings: RetentionSettings,
        goal: Callable[[], str],
        clock: Clock,
        rows: int,
        report: Callable[..., object],
    ) -> None:
        self._keeping = keeping
        self._settings = settings
        self._goal = goal
        self._clock = clock
        self._rows = rows
        self._report = report

    async def keep_forever(self, every_s: float) -> None:
        """Make each pass now and then; ends by cancellation only. One that fails holds up no other."""
        passes = {"reseal": self.reseal, "erase": self.erase_over, "forget": self.forget}
        lasting = {name: Lasting(name) for name in passes}
        while True:
            await self._clock.sleep(every_s)
            for name, make in passes.items():
                with lasting[name]:
                    try:
                        await make()
                    except DependencyDown as error:
                        self._report("upkeep_waits", work=name, error=str(error))

    async def reseal(self) -> int:
        """Go through the table once for each goal (the keys in force, and the day); how many were sealed anew."""
        goal = self._goal()
        if (taken := await self._keeping.take("reseal")) is None:
            return 0
        place = taken[0] if taken[1] == goal else ""
        total = waiting = 0
        while place != DONE:
            started = self._clock.monotonic()
            place, moved, left = await self._keeping.reseal(place, self._rows)
            total, waiting = total + moved, waiting + left
            # What waits for its decision is come back to, from the beginning.
            await self._keeping.put("reseal", "" if place == DONE and waiting else place, goal)
            await self._rest(started)
        await self._keeping.put("reseal", "" if waiting else DONE, goal, 0.0)
        if total:
            self._report("resealed", count=total, waiting=waiting)
        return total

    async def erase_over(self) -> int:
        """Erase what must be kept no longer, and delete old histories; how many."""
        if not self._settings.erases or await self._keeping.take("erase") is None:
            return 0
        now_s = self._clock.now().timestamp()
        total = 0
        for state, closed_before in over(self._settings, now_s).items():
            total += await self._erase_state(state, closed_before, now_s)
        started = self._clock.monotonic()
        while deleted := await self._keeping.delete_histories(now_s - self._settings.history_days * DAY_S, self._rows):
            self._report("histories_deleted", count=deleted)
            await self._keeping.put("erase", "", "")
            await self._rest(started)
            started = self._clock.monotonic()
        await self._keeping.put("erase", "", "", 0.0)
        return total

    async def forget(self) -> int:
        """Delete the hashes by which subjects of erased applications are found still; how many.

        Those of an application that was erased unread: the numbers in it could not be read, so neither their hashes.
        Goes through all hashes, and only where there is such an application.
        """
        if (taken := await self._keeping.take("forget")) is None:
            return 0
        place, told = taken
        total = 0
        while place != DONE:
            started = self._clock.monotonic()
            if (went := await self._keeping.forget(place, told)) is None:
                break
            place, total = went[0], total + went[1]
            await self._rest(started)
        await self._keeping.leave("forget")
        if total:
            self._report("subjects_forgotten", count=total)
        return total

    async def _erase_state(self, state: State, closed_before: float, now_s: float) -> int:
        total = 0
        while ids := await self._keeping.over(state, closed_before, now_s, self._rows):
            started = self._clock.monotonic()
            rule = f"{state.value.lower()}_is_over"
            found = await self._keeping.erase(ids, rule, lambda one: must_keep(one, self._settings, now_s))
            erased = sum(keep is None for keep in found.values())
            if not erased:
                break  # All of them changed since.
            total += erased
            self._report("erased", count=erased, rule=rule)
            await self._keeping.put("erase", "", "")
            await self._rest(started)
        return total

    async def _rest(self, started: float) -> None:
        await self._clock.sleep(9 * max(0.001, self._clock.monotonic() - started))
