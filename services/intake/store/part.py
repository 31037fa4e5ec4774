"""What each part of the store stands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import Database, Statement
from services.intake.ports import Parked
from services.intake.privacy import Privacy

SYNC = Statement("SELECT {synced}")
"""What was found instead of written may be on one disk only: the answer is to wait until it is on all it should be."""


class Part:
    """A part of the store: its database, how content is kept there, and who writes. All raise DependencyDown.

    told  takes what the store parked by itself, since it cannot be read.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        owner: str,
        lease_s: float,
        privacy: Privacy,
        told: Callable[[Sequence[Parked]], None] = lambda _: None,
    ) -> None:
        self._database = database
        self._privacy = privacy
        self._clock = clock
        self._owner = owner
        self._lease_s = lease_s
        self._told = told
