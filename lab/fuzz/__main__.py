"""Fuzz every RPC on a real mesh, and every file that we read.

python -m lab.fuzz [--requests 10000] [--files 500] [--only NAME] [--seed N]
python -m lab.fuzz --seed N --only lending.intake.v1.IntakeService/GetApplication --at 17      one request again
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path

from lab.fuzz import files, rpc
from lab.rows import Row, write_rows
from loanmesh.runtime.clock import SystemClock


def main() -> None:
    """Read the command line, run, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="for each RPC")
    parser.add_argument("--files", type=int, default=500, help="mutants of each kind of file")
    parser.add_argument("--only", default="", help="RPCs whose full name holds this")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--at", type=int, help="make this one request again; --only names its RPC in full")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz.json"))
    asked = parser.parse_args()
    clock = SystemClock()
    started = clock.monotonic()

    def say(line: str) -> None:
        print(f"{clock.monotonic() - started:6.1f} s  {line}", file=sys.stderr, flush=True)

    say(f"seed {asked.seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        if asked.at is not None:
            asyncio.run(rpc.again(Path(folder), asked.seed, asked.only, asked.at, clock, say))
            return
        rows: list[Row] = asyncio.run(rpc.run(Path(folder), asked.seed, asked.requests, asked.only, clock, say))
    if not asked.only:
        rows += files.run(asked.seed, asked.files, say)
    write_rows(asked.out, rows)
    say(f"seed {asked.seed}; wrote {asked.out}")
    sys.exit(not all(row.met for row in rows))


if __name__ == "__main__":
    main()
