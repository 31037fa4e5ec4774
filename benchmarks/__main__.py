"""`make bench`: ours and its rivals, side by side, in one run.

    python -m benchmarks [--only NAME[,NAME...]] [--quick] [--seed N]

Prints markdown; writes build/bench.json and docs/pictures/. Ends with 1 where a target is missed. --quick runs each
section in seconds to see that it works: its times mean nothing, so only its counts are judged, and pictures go to
build/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from benchmarks import (
    amplification,
    core,
    durable,
    goodput,
    priorities,
    profile,
    promotion,
    recovery,
    replicas,
    stages,
    telemetry,
)
from benchmarks.bench import Bench, Found, Row, as_json, verdict
from benchmarks.machine import pin, share_out
from loanmesh.runtime.clock import SystemClock

SECTIONS: dict[str, tuple[str, Callable[[Bench], Awaitable[Found]]]] = {
    "core": ("What one application costs, beside a bare chain", core.measure),
    "goodput": ("Goodput against offered load", goodput.measure),
    "durable": ("Beside engines for durable workflows", durable.measure),
    "promotion": ("A promotion", promotion.measure),
    "recovery": ("After the trouble", recovery.measure),
    "priorities": ("Who waits in front of a screen", priorities.measure),
    "amplification": ("Retries against a part that always fails", amplification.measure),
    "replicas": ("Two replicas against one", replicas.measure),
    "telemetry": ("What being seen costs", telemetry.measure),
    "profile": ("Where the CPU goes", profile.measure),
    "stages": ("What a stage costs by itself", stages.measure),
}
OUT = Path("build/bench.json")


async def run(bench: Bench, names: list[str]) -> dict[str, Found]:
    """Run sections and print what each found."""
    found: dict[str, Found] = {}
    for name in names:
        title, measure = SECTIONS[name]
        bench.say(f"{name} ...")
        found[name] = await measure(bench)
        said = [f"### {title}", *found[name].markdown, *([verdict(found[name].rows)] if found[name].rows else [])]
        print("\n\n".join(said), end="\n\n", flush=True)
    return found


def write(bench: Bench, found: dict[str, Found]) -> list[Row]:
    """Write build/bench.json; all rows."""
    rows = [row for one in found.values() for row in one.rows]
    OUT.parent.mkdir(exist_ok=True)
    written = {
        "seed": bench.seed,
        "quick": bench.quick,
        "machine": {"cores": os.cpu_count(), "kind": platform.machine(), "python": platform.python_version()},
        "rows": as_json(rows),
        "measured": {name: one.measured for name, one in found.items()},
    }
    OUT.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return rows


def names_of(text: str) -> list[str]:
    """Sections by name, in our order."""
    asked = text.split(",")
    if unknown := set(asked) - set(SECTIONS):
        raise argparse.ArgumentTypeError(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in asked]


def main() -> int:
    """Run from the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names_of, default=list(SECTIONS), help="sections to run, with commas")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; times mean nothing then")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    cores = share_out(os.sched_getaffinity(0))
    pin(os.getpid(), cores.outside)
    pictures = Path("build/pictures" if asked.quick else "docs/pictures")
    pictures.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    bench = Bench(asked.quick, asked.seed, SystemClock(), cores, pictures, say)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = write(bench, runner.run(run(bench, asked.only)))
    placed = "apart" if cores.apart else "on one core together: its own limit shows"
    print(f"seed {bench.seed}; services and generator {placed}; written to {OUT}")
    missed = [row for row in rows if row.met is False and not (bench.quick and row.timed)]
    for row in missed:
        say(f"missed: {row.name}: {row.value:.3g}, target {row.target}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
