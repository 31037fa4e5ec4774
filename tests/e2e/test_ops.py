"""The SRE's commands against a whole mesh: how it is, whom it depends on, pausing a source and giving it back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.drills import free_base
from tests.e2e.test_command import run, up  # noqa: F401  `up` is a fixture.

PARTS = ("intake", "bureau", "scoring", "pricing")


def ask(up: dict[str, Any], *words: str, parts: tuple[str, ...] = PARTS) -> Iterator[dict[str, Any]]:  # noqa: F811
    addresses = [word for part in parts for word in ("--address", up["parts"][part]["address"])]
    done = run(*words, *addresses, "--json")
    assert done.returncode == 0, done.stderr
    return (json.loads(line) for line in done.stdout.splitlines())


def breakers(up: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:  # noqa: F811
    (answer,) = ask(up, "deps", parts=(part,))
    return {d["name"].removeprefix("dependencies/"): d for d in answer["dependencies"]}


def test_an_sre_sees_and_pauses_and_gives_back(up: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    at = {"LOANMESH_ADDRESS": up["address"], "LOANMESH_ACTOR": "li.na"}
    statuses = {status["service"]: status for status in ask(up, "status")}
    assert set(statuses) == set(PARTS)
    assert all(not status["draining"] and status["loopLagMaxMs"] >= 0 for status in statuses.values())
    assert [queue["name"] for queue in statuses["bureau"]["queues"]] == ["cache_writes"]
    assert set(breakers(up, "intake")) == {"bureau", "scoring", "pricing"}
    assert set(breakers(up, "bureau")) == {"central_bank", "tax", "registry", "court", "bank_flow"}
    assert breakers(up, "scoring") == {}

    bureau = up["parts"]["bureau"]["address"]
    paused = run("override", "court", "open", "--address", bureau, "--reason", "maintenance", **at)
    assert paused.returncode == 0, paused.stderr
    court = breakers(up, "bureau")["court"]
    assert court["breakerState"] == "BREAKER_STATE_FORCED_OPEN"
    assert court["breakerCause"] == "forced open by li.na: maintenance"

    file = tmp_path / "a.json"
    file.write_text(run("example", "person", "0").stdout, encoding="utf-8")
    waiting = json.loads(run("submit", str(file), "--json", "--wait", "2", **at).stdout)
    assert waiting["state"] == "STATE_PENDING"
    assert waiting["waitingFor"] == ["source_missing:court"]

    assert run("override", "court", "auto", "--address", bureau, **at).returncode == 0
    decided = json.loads(run("watch", waiting["name"], "--json", **at).stdout.splitlines()[-1])
    assert decided["state"] == "STATE_DECIDED"
    assert breakers(up, "bureau")["court"]["breakerState"] == "BREAKER_STATE_CLOSED"
    assert int(breakers(up, "intake")["scoring"]["calls"]) > 0
    assert "central_bank" in run("deps", "--address", bureau, COLUMNS="200").stdout
    assert "loop lag" in run("status", "--address", bureau).stdout

    buf = str(Path(sys.executable).parent / "buf")
    listed = subprocess.run([buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--list-methods", f"http://{bureau}"],
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert "lending.ops.v1.OpsService/GetStatus" in listed.stdout, listed.stderr

    unknown = run("override", "moon", "open", "--address", bureau, COLUMNS="500", **at)
    assert unknown.returncode == 4
    assert "dependencies/court" in unknown.stdout + unknown.stderr


def test_a_source_is_broken_and_paused_everywhere_without_naming_a_process(up: dict[str, Any]) -> None:  # noqa: F811
    state = {"LOANMESH_STATE": up["state"], "LOANMESH_ACTOR": "li.na", "COLUMNS": "200"}
    broken = run("source", "court", "dead", "--json", **state)
    assert json.loads(broken.stdout)["court"]["dead"] is True, broken.stderr
    assert "court            dead\n" in run("source", **state).stdout
    assert json.loads(run("source", "court", "well", "--json", **state).stdout)["court"]["dead"] is False
    assert run("source", "court", "sideways", **state).returncode == 2
    assert run("source", "moon", "dead", **state).returncode == 2

    paused = run("override", "court", "open", **state)
    assert paused.returncode == 0, paused.stderr
    assert up["parts"]["bureau"]["address"] in paused.stdout
    assert up["parts"]["scoring"]["address"] not in paused.stdout, "it knows no court"
    assert "loanmesh override court auto" in paused.stdout
    assert run("override", "moon", "open", **state).returncode == 4
    told = [json.loads(line) for line in run("status", "--json", **state).stdout.splitlines()]
    assert {one["service"] for one in told} == set(PARTS)


def test_a_process_that_is_away_is_said_plainly() -> None:
    gone = run("status", "--address", f"127.0.0.1:{free_base()}")
    assert gone.returncode == 3
    assert "not reachable" in gone.stdout
    assert run("override", "court", "sideways", "--address", "127.0.0.1:1", LOANMESH_ACTOR="li.na").returncode == 2
