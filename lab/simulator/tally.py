"""Many runs, counted; on several processes where asked for."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

from lab.judge import by_rule
from lab.simulator.world import simulate

CHUNK = 25
"""Seeds a piece of work: small enough for progress, large enough not to be felt."""


@dataclass
class Tally:
    """What a number of runs came to."""

    runs: int = 0
    applications: int = 0
    faults: int = 0
    virtual_s: float = 0.0
    broken: list[tuple[int, str]] = field(default_factory=list)
    """(seed, first violation) of each run that broke a rule."""
    rules: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """And these."""
        self.runs += other.runs
        self.applications += other.applications
        self.faults += other.faults
        self.virtual_s += other.virtual_s
        self.broken += other.broken
        self.rules += other.rules


def run_chunk(first: int, count: int) -> Tally:
    """Runs of consecutive seeds."""
    tally = Tally()
    for seed in range(first, first + count):
        outcome = simulate(seed)
        tally.runs += 1
        tally.applications += outcome.applications
        tally.faults += outcome.faults
        tally.virtual_s += outcome.virtual_s
        if outcome.violations:
            tally.broken.append((seed, str(outcome.violations[0])))
            tally.rules.update(by_rule(outcome.violations).keys())
    return tally


def run_many(first: int, count: int, processes: int) -> Iterator[Tally]:
    """Tallies as they come, of all the seeds together."""
    chunks = [(at, min(CHUNK, first + count - at)) for at in range(first, first + count, CHUNK)]
    if processes == 1:
        yield from (run_chunk(*chunk) for chunk in chunks)
        return
    # Never fork a process that has imported grpc.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_chunk, *chunk) for chunk in chunks]):
            yield done.result()
