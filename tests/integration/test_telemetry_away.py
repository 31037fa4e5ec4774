"""A collector that hangs, or is not there, holds nobody up: neither while a process works nor when it ends."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from loanmesh.runtime.telemetry import STOP_S_MAX

WORK = """
import json, sys
import structlog
from loanmesh.runtime import telemetry, tracing
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.settings import TelemetrySettings

clock = SystemClock()
telemetry.start_telemetry("intake", "intake-1-a", TelemetrySettings(otlp_endpoint=sys.argv[1]))
recorder = tracing.recorder()
began = clock.monotonic()
for number in range(2000):
    recorder.tell("ask court", tracing.Place(1, number + 1), 0, 1.0, 2.0, error="timeout")
structlog.get_logger().warning("breaker_changed", dependency="court")
worked_s = clock.monotonic() - began
telemetry.stop_telemetry()
print(json.dumps({"worked_s": worked_s, "stopped_s": clock.monotonic() - began - worked_s}), flush=True)
"""


@pytest.fixture(params=["hangs", "refuses"])
def endpoint(request: pytest.FixtureRequest) -> Iterator[str]:
    """A port where connections are taken and never answered, or where nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            listening.listen(16)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_collector_that_does_not_answer_holds_nobody_up(endpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORK, endpoint], capture_output=True, text=True, timeout=60, check=True
    )
    took = json.loads(done.stdout)
    # Far below the ten seconds and more that the exporters themselves would take.
    assert took["worked_s"] < 2.0
    assert took["stopped_s"] < STOP_S_MAX + 2.0
    # Nor does it fill the log: one line of ours, none of the exporters'.
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["breaker_changed"]
