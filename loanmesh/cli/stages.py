"""Where the time of decided applications went, by stage, from what was stored with each and from what we saw."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from lending.intake.v1 import intake_service_pb2 as pb
from rich.table import Table

from loanmesh.cli import show
from loanmesh.client import Client

AT_ONCE = 32
"""Explanations asked for at once."""
ACKNOWLEDGE, GATHER, SCORE, PRICE, CONCLUDE, COMMIT = (
    "acknowledge (the submit call)",
    "wait for its turn, gather evidence",
    "score",
    "price",
    "conclude",
    "commit, and word of it to us",
)


@dataclass
class Stages:
    """Seconds by stage, one entry an application.

    Waiting and gathering are one stage, since nothing stored says when the one ended. The call's own time runs beside
    the wait: an application waits from the moment it is stored. Commit is from the mesh's clock to ours.
    """

    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {stage: [] for stage in (ACKNOWLEDGE, GATHER, SCORE, PRICE, CONCLUDE, COMMIT)}
    )

    def note(self, stage: str, seconds: float) -> None:
        """Count one application's time in a stage."""
        self.seconds[stage].append(seconds)

    def note_stored(self, application: pb.Application, told: pb.ExplainDecisionResponse) -> None:
        """Count the stages that stored times tell apart."""
        times = (
            application.create_time, told.profile.gather_time, told.score.score_time, told.pricing.price_time,
            told.decision.decide_time,
        )  # fmt: skip
        at_s = [time.ToNanoseconds() / 1e9 for time in times]
        for stage, begin, end in zip((GATHER, SCORE, PRICE, CONCLUDE), at_s, at_s[1:], strict=False):
            self.note(stage, end - begin)

    def table(self) -> Table:
        """Median, 95th percentile and slowest of each stage, milliseconds."""
        rows = []
        for stage, seconds in self.seconds.items():
            if seconds:
                ordered = sorted(seconds)
                picked = (
                    ordered[len(ordered) // 2],
                    ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
                    ordered[-1],
                )
                rows.append((stage, *(f"{1000 * s:,.1f}" for s in picked)))
        return show.table("where the time went, ms an application", ("stage", "median", "p95", "slowest"), rows)


async def ask_stages(client: Client, decided: Mapping[str, pb.Application], stages: Stages) -> None:
    """Read the stored times of all decided applications."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(application: pb.Application) -> None:
        async with room:
            stages.note_stored(application, await client.explain(application.name))

    await asyncio.gather(*(one(a) for a in decided.values() if a.HasField("decision")))
