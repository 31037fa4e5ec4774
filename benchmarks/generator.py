"""lab.traffic as a child on its own core, and what the mesh says afterwards of everything that was sent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.machine import output_of
from lab.traffic import Answer, Record
from loanmesh.client import Client

DEADLINE_S = 2.0
"""How long a caller waits for its acknowledgement."""
CLIENTS = 50
"""Callers that share the traffic."""
COUNT_MAX = 100_000


@dataclass(frozen=True)
class Played:
    """A run of the generator."""

    report: Mapping[str, Any]
    records: Sequence[Record]


async def traffic(bench: Bench, address: str, *, module: str = "lab.traffic", **options: object) -> Played:
    """Run the generator with these options, e.g. `rate=50, seconds=10, shape="spike"`; what it recorded.

    module  another generator of the same arrivals.
    """
    named = {"seed": bench.seed, "deadline_s": DEADLINE_S, "clients": CLIENTS, "count_max": COUNT_MAX, **options}
    arguments = [part for name, value in named.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    seconds = float(str(named["seconds"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        command = ("-m", module, address, "--json", "--records", str(file), *arguments)
        # Making applications, the arrivals, and the slowest answers.
        report = json.loads(await output_of(*command, cores=bench.cores.outside, within_s=180 + 3 * seconds))
        with file.open(encoding="utf-8") as lines:
            read = [json.loads(line) for line in lines]
    return Played(report, [Record(**{**one, "answer": Answer(**one["answer"])}) for one in read])


@dataclass(frozen=True)
class Decided:
    """When the mesh stored and decided an application, seconds since 1970."""

    created_at: float
    decided_at: float


async def decisions(client: Client) -> dict[str, Decided]:
    """Everything that is decided, by name, read through the public API."""
    found: dict[str, Decided] = {}
    token = ""
    while True:
        page = await client.list(filter="state = DECIDED", page_size=1000, page_token=token)
        for one in page.applications:
            decided_at = one.decision.decide_time.ToNanoseconds() / 1e9
            found[one.name] = Decided(one.create_time.ToNanoseconds() / 1e9, decided_at)
        token = page.next_page_token
        if not token:
            return found


def backlog(decided: Mapping[str, Decided], each_s: float = 0.5) -> tuple[list[float], list[int]]:
    """How many were stored and not decided, over time: seconds since the first was stored, and counts."""
    changes = sorted([(d.created_at, 1) for d in decided.values()] + [(d.decided_at, -1) for d in decided.values()])
    first = changes[0][0]
    at_s, counts, waiting = [0.0], [0], 0
    for at, change in changes:
        while at - first >= at_s[-1] + each_s:
            at_s.append(at_s[-1] + each_s)
            counts.append(waiting)
        waiting += change
    return [*at_s, at_s[-1] + each_s], [*counts, waiting]
