"""The command, as a person meets it: real processes, real exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.drills import free_base
from loanmesh.cli.mesh import DEFAULT_PORTS
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.keys import new_ring, write_ring

LOANMESH = [sys.executable, "-m", "loanmesh"]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LOANMESH, *words], capture_output=True, text=True, check=False, timeout=60,
                          env={**os.environ, **environment})  # fmt: skip


@pytest.fixture
def up(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """`loanmesh up --json` in a folder of its own; stopped by Ctrl-C, which must end it with 0."""
    base, state = free_base(), str(tmp_path / "state")
    command = [*LOANMESH, "up", "--json", "--state", state, "--port-base", str(base)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    ready = json.loads(line)
    yield {**ready, "base": base, "state": state, "address": ready["parts"]["intake"]["address"]}
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    for part in ready["parts"].values():
        with pytest.raises(ProcessLookupError):
            os.kill(part["pid"], 0)


def test_the_main_job_by_command(up: dict[str, Any], tmp_path: Path) -> None:
    at = {"LOANMESH_ADDRESS": up["address"]}
    file = tmp_path / "a.json"
    file.write_text(run("example", "firm", "0").stdout, encoding="utf-8")
    submitted = run("submit", str(file), "--json", "--request-id", "request-1", "--wait", "20", **at)
    assert submitted.returncode == 0, submitted.stderr
    application = json.loads(submitted.stdout)
    assert application["state"] == "STATE_DECIDED"
    name = application["name"]
    again = run("submit", str(file), "--json", "--request-id", "request-1", **at)
    assert json.loads(again.stdout) == application
    assert json.loads(run("get", name, "--json", **at).stdout) == application
    assert json.loads(run("watch", name, "--json", **at).stdout) == application
    assert name in run("list", "--json", "--filter", "state = DECIDED", **at).stdout
    explained = run("explain", name, "--schedules", **at)
    assert explained.returncode == 0, explained.stderr
    assert "evidence:" in explained.stdout
    assert json.loads(run("history", name, "--json", **at).stdout)["chainIntact"]
    offered = bool(application["decision"].get("offers"))
    assert run("accept", name, "offer-1", **at).returncode == (0 if offered else 4)
    assert run("get", f"lenders/demo/applications/{'0' * 36}", **at).returncode == 4

    second = run("up", "--state", up["state"], "--port-base", str(free_base()))
    assert second.returncode == 1
    assert "another mesh" in second.stderr + second.stdout
    other = run("up", "--state", str(tmp_path / "other"), "--port-base", str(up["base"]))
    assert other.returncode == 1
    assert "--port-base" in other.stderr + other.stdout

    buf = str(Path(sys.executable).parent / "buf")
    listed = subprocess.run([buf, "curl", "--http2-prior-knowledge", "--protocol", "grpc", "--list-methods", f"http://{up['address']}"],
                            capture_output=True, text=True, check=False)  # fmt: skip
    assert "lending.intake.v1.IntakeService" in listed.stdout, listed.stderr


@pytest.mark.parametrize(
    ("text", "where"),
    [('{"loan": {\n  "amountFen": 5,,\n}}', ":2:"), ('{\n "loan": {"colour": 1}}', ":2:"), ("[]", ":1:1")],
)
def test_a_malformed_file_is_reported_with_its_place(text: str, where: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="utf-8")
    done = run("submit", str(file), COLUMNS="500")
    assert done.returncode == 2
    assert where in done.stderr
    assert "nothing was sent" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_it_starts_ends_it_and_leaves_nothing_running(tmp_path: Path) -> None:
    state = tmp_path / "state"
    base = free_base()
    command = [*LOANMESH, "up", "--json", "--state", str(state), "--port-base", str(base)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = state / "logs" / "sandbox.log"  # The first part to be started, long before the last is up.
    while not log.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), said
    assert "Traceback" not in said
    with (state / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for port in range(base, base + len(DEFAULT_PORTS)):
        with socket.socket() as one:
            assert one.connect_ex(("127.0.0.1", port)) != 0


def test_up_says_which_setting_is_wrong(tmp_path: Path) -> None:
    words = ("up", "--state", str(tmp_path / "state"), "--port-base", str(free_base()))
    done = run(*words, SCORING_FIRM_MODEL="nope", COLUMNS="500")
    assert done.returncode == 1
    assert "SCORING_FIRM_MODEL" in done.stdout
    assert "firm-2026-11" in done.stdout


def test_nobody_there_is_said_plainly(tmp_path: Path) -> None:
    gone = run("get", f"lenders/demo/applications/{'0' * 36}", LOANMESH_ADDRESS=f"127.0.0.1:{free_base()}")
    assert gone.returncode == 3
    assert "loanmesh up" in gone.stderr
    data = run("decide-firms", str(tmp_path), COLUMNS="500")
    assert data.returncode == 2
    assert "cn_sme_firms_302_nocredit.csv" in data.stderr + data.stdout


@pytest.mark.parametrize(
    ("service", "setting", "value", "said"),
    [
        ("pricing", "PRICING_POLICY", "moon", "cn-demo-2026-11"),
        ("intake", "INTAKE_DATABASE_URL", "sqlite:////proc/nothing/x.db", "INTAKE_DATABASE_URL"),
        ("intake", "INTAKE_PRIVACY__KEYS_FILE", "/proc/nothing/keys.json", "loanmesh keys new /proc/nothing/keys.json"),
        ("bureau", "BUREAU_PRIVACY__KEYS_FILE", "/dev/null", "BUREAU_PRIVACY__KEYS_FILE: /dev/null is no JSON"),
        ("scoring", "SCORING_SERVER__LISTEN", "nowhere", "SCORING_SERVER__LISTEN"),
        ("intake", "INTAKE_COLOUR", "red", "INTAKE_COLOUR"),
    ],
)
def test_a_wrong_setting_stops_the_start(tmp_path: Path, service: str, setting: str, value: str, said: str) -> None:
    write_ring(tmp_path / "keys.json", new_ring(SystemClock().now()), new=True)
    keys = {"INTAKE_PRIVACY__KEYS_FILE": str(tmp_path / "keys.json")} if service == "intake" else {}
    env = {**os.environ, **keys, f"{service.upper()}_TLS__MODE": "plaintext", setting: value}
    done = subprocess.run([sys.executable, "-m", f"services.{service}.main"], capture_output=True, text=True,
                          env=env, check=False, timeout=30)  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
