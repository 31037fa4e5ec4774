"""Logs: one JSON line an event, and none of them worth stopping for."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator

import pytest
import structlog

from loanmesh.runtime.settings import TelemetrySettings
from loanmesh.runtime.telemetry import start_telemetry


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
