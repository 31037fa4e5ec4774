"""Run seeds and say what they found.

python -m lab.simulator --seeds 10000 [--from 0] [--processes 2] [--json]     many; writes build/simulate.json
python -m lab.simulator --seed 123 [--trace] [--history FILE]                 one, again, with its log
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from lab.simulator.tally import Tally, run_many
from lab.simulator.world import simulate


def rows(tally: Tally, took_s: float) -> list[dict[str, object]]:
    """Figures as every benchmark of ours writes them."""
    whole = tally.runs - len(tally.broken)
    return [
        {"name": "simulated seeds without a violation", "value": whole, "unit": "seeds", "target": tally.runs,
         "met": whole == tally.runs},
        {"name": "simulated applications", "value": tally.applications, "unit": "applications", "target": None,
         "met": None},
        {"name": "simulated faults", "value": tally.faults, "unit": "faults", "target": None, "met": None},
        {"name": "virtual time lived through", "value": round(tally.virtual_s / 3600, 1), "unit": "hours",
         "target": None, "met": None},
        {"name": "speed", "value": round(tally.runs / took_s * 60), "unit": "seeds a minute", "target": None,
         "met": None},
    ]  # fmt: skip


def one(seed: int, tracing: bool, history: str) -> int:
    """Repeat a run and show it; 1 where it breaks a rule."""
    outcome = simulate(seed, tracing=tracing)
    print("\n".join(outcome.trace), end="\n" if outcome.trace else "")
    if history:
        Path(history).write_text(outcome.text, encoding="utf-8")
    for violation in outcome.violations:
        print(violation)
    print(
        f"seed {seed}: {outcome.applications} applications, {outcome.faults} faults, {outcome.virtual_s:.1f} virtual"
        f" seconds, {len(outcome.violations)} violations"
    )
    return 1 if outcome.violations else 0


def many(first: int, count: int, processes: int, as_json: bool) -> int:
    """Run seeds with progress; 1 where any breaks a rule."""
    tally, started = Tally(), time.monotonic()
    for part in run_many(first, count, processes):
        tally.add(part)
        took_s = time.monotonic() - started
        for seed, text in part.broken:
            print(f"\nseed {seed} broke a rule; repeat it: python -m lab.simulator --seed {seed} --trace\n    {text}")
        if sys.stderr.isatty():
            pace = f"{tally.runs / took_s * 60:,.0f} a minute "
            print(f"\r{tally.runs:,} of {count:,} seeds, {len(tally.broken)} broken, {pace}", end="", file=sys.stderr)
    found = rows(tally, time.monotonic() - started)
    Path("build").mkdir(exist_ok=True)
    Path("build/simulate.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(f"\n{tally.runs:,} seeds from {first}: {len(tally.broken)} broke a rule {dict(tally.rules) or ''}")
        for row in found:
            print(f"{row['name']:<40} {row['value']:>12,} {row['unit']}")
    return 1 if tally.broken else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lab.simulator", description="Run seeds and say what they found.")
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--trace", action="store_true", help="with --seed: print all that happens")
    parser.add_argument("--history", default="", help="with --seed: write what was seen, as JSON lines")
    said = parser.parse_args()
    if said.seed is not None:
        return one(said.seed, said.trace, said.history)
    return many(said.first, said.seeds, said.processes, said.json)


if __name__ == "__main__":
    sys.exit(main())
