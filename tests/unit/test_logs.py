"""Logs: one JSON line an event, and none of them worth stopping for."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Iterator

import pytest
import structlog

from loanmesh.runtime.settings import TelemetrySettings
from loanmesh.runtime.telemetry import start_telemetry
from tests.otlp import collecting


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Logging is set up for the whole process: leave none of it behind."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class FullDisk(io.StringIO):
    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_log_that_cannot_be_written_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sys, "stderr", disk)
    start_telemetry("intake", "intake-1-x", TelemetrySettings())
    log = structlog.get_logger()
    log.warning("claim_failed", error="disk I/O error")
    disk.full = False
    log.warning("claim_failed", error="again")
    line = json.loads(disk.getvalue())
    assert (line["event"], line["error"], line["service"]) == ("claim_failed", "again", "intake")


SENDS = """
import sys
import structlog
from loanmesh.runtime.settings import TelemetrySettings
from loanmesh.runtime.telemetry import start_telemetry, stop_telemetry
start_telemetry("intake", "intake-1-x", TelemetrySettings(otlp_endpoint=sys.argv[1]))
said = "13900001234 is wrong"
error = ValueError(said)
structlog.get_logger().error(f"says {said}", text=said, legal_name="张三", deep={"a": [said]}, exc_info=error)
stop_telemetry()
"""


async def test_logs_leave_by_otlp_masked_as_on_stderr() -> None:
    async with collecting() as collected:
        sender = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SENDS, collected.endpoint, stderr=asyncio.subprocess.PIPE
        )
        _, stderr = await sender.communicate()
    (record,) = collected.logs
    assert record.body.string_value == "says [masked] is wrong"
    said = {one.key: one.value.string_value for one in record.attributes}
    assert (said["text"], said["legal_name"]) == ("[masked] is wrong", "[masked]")
    assert (said["deep"], said["exception.type"]) == ("{'a': ['[masked] is wrong']}", "ValueError")
    assert "13900001234" not in str(record)
    assert "13900001234" not in stderr.decode()
    assert "ValueError: [masked] is wrong" in stderr.decode()
