"""The benchmark's core, in seconds: it measures what it says, loses nothing, and writes what machines read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks import core, stages
from benchmarks.__main__ import write
from benchmarks.bench import Bench
from benchmarks.machine import share_out
from loanmesh.runtime.clock import SystemClock

BARE = ("bare chain", "bare chain, cold", "bare chain, alone", "bare hop")
OURS = ("one by one, cold", "one by one, warm", "by submit_many, warm", "one alone, warm", "accepts one by one",
        "accepts by submit_many")  # fmt: skip


async def test_ours_and_the_bare_chain_are_measured_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(True, 1, SystemClock(), share_out(os.sched_getaffinity(0)), tmp_path, print)
    # That nothing was refused, lost or left undecided it asserts itself.
    found = await core.measure(bench)
    assert set(found.measured) == {*BARE, *OURS}
    assert all(one["count"] > 0 and one["seconds"] > 0 for one in found.measured.values())
    assert {name: len(found.measured[name]["cpu_ms"]) for name in OURS[:4]} == dict.fromkeys(OURS[:4], 4)
    assert len(found.rows) == 8
    assert all(row.value > 0 and row.target and row.met is not None for row in found.rows)
    monkeypatch.setattr("benchmarks.__main__.OUT", tmp_path / "bench.json")
    write(bench, {"core": found})
    written = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [set(row) >= {"name", "value", "unit", "target", "met"} for row in written["rows"]] == [True] * 8
    assert written["seed"] == 1


async def test_a_stage_is_measured_by_itself_at_each_size_of_batch(tmp_path: Path) -> None:
    bench = Bench(True, 1, SystemClock(), share_out(os.sched_getaffinity(0)), tmp_path, print)
    found = await stages.measure(bench)
    assert set(found.measured) == {"bureau, warm", "bureau, cold", "scoring", "pricing"}
    assert all(us > 0 for sizes in found.measured.values() for us in sizes.values())
