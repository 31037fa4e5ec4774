"""The file that `up` keeps traces in, and the sink before it: bounded, and never anybody's trouble."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import FakeClock
from loanmesh.seeing.otlp import spans_of
from loanmesh.seeing.sink import Sink
from loanmesh.seeing.spans import CannotRead, Log, Span
from loanmesh.seeing.store import KeptTraces, TraceFile
from tests.spans import a_span

MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "traces.db"


async def test_what_was_written_is_read_by_application_and_by_trace(path: Path) -> None:
    mine, shared = a_span(application="a1", error="deferred"), a_span(span_id="02", parent="01", error="timeout")
    other = a_span(trace="ff", application="a2")
    file = TraceFile(path)
    file.write([mine, shared, other], [Log(5.0, mine.trace_id, "intake", "i-1", "warning", "breaker_changed")], {})
    kept = KeptTraces(path)
    assert await kept.of_application("a1") == [mine, shared]
    assert await kept.of_trace(other.trace_id) == [other]
    assert [line.event for line in await kept.logs(mine.trace_id, 0.0, 1.0)] == ["breaker_changed"]
    assert await kept.of_application("nobody") == []


async def test_only_traces_in_which_something_was_wrong_are_asked_for_causes(path: Path) -> None:
    wrong = a_span(application="a1", error="deferred", kept_for="deferred")
    well = a_span(trace="ee", application="a2", kept_for="sampled")
    late = a_span(trace="dd", application="a3", kept_for="late")
    TraceFile(path).write([wrong, well, late], [], {})
    assert {span.application for span in await KeptTraces(path).since(0.0)} == {"a1", "a3"}
    assert await KeptTraces(path).since(1e9) == []


async def test_a_span_told_twice_is_kept_by_whoever_knows_how_long_it_took(path: Path) -> None:
    own = a_span(began=1.0, ended=3.0)
    guess = a_span(began=1.0, ended=1.0, attributes={semconv.RECONSTRUCTED: True})
    for first, second in ((own, guess), (guess, own)):
        file = TraceFile(path.with_name(f"{first.ended}.db"))
        file.write([first], [], {})
        file.write([second], [], {})
        assert await KeptTraces(path.with_name(f"{first.ended}.db")).of_trace(own.trace_id) == [own]


async def test_the_file_stays_within_its_age_and_size(path: Path) -> None:
    file = TraceFile(path)
    text = {"loanmesh.cause": "x" * 2000}
    for second in range(100):
        spans = [a_span(trace=f"{second:04x}{n:04x}", began=second, ended=second, attributes=text) for n in range(20)]
        file.write(spans, [], {})
    file.trim(now=100.0, keep_s=50.0, keep_bytes=100 * MIB)
    left = await KeptTraces(path).since(0.0)
    assert left == []  # None of them was wrong.
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT min(ended) FROM span").fetchone()[0] >= 50.0
    file.trim(now=100.0, keep_s=50.0, keep_bytes=MIB)
    assert 0 < file.size_bytes <= MIB
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT max(ended) FROM span").fetchone()[0] == 99.0  # The newest stay.


async def test_a_file_that_is_no_database_any_more_is_put_aside(path: Path) -> None:
    await asyncio.to_thread(path.write_bytes, b"no database, but half a page of something else" * 100)
    TraceFile(path).write([a_span()], [], {})
    assert len(await KeptTraces(path).of_trace(a_span().trace_id)) == 1
    assert path.with_suffix(".broken").exists()


async def test_where_nothing_is_kept_the_way_out_is_told(path: Path) -> None:
    with pytest.raises(CannotRead, match="loanmesh up"):
        await KeptTraces(path).of_application("a1")


def an_export() -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    span = request.resource_spans.add().scope_spans.add().spans.add()
    span.trace_id, span.span_id, span.name = b"\1" * 16, b"\2" * 8, "ask court"
    span.status.code = Status.STATUS_CODE_ERROR
    span.attributes.add(key="loanmesh.source").value.string_value = "court"
    return request


def test_an_export_is_read_as_spans() -> None:
    (span,) = spans_of(an_export())
    assert (span.trace_id, span.name, span.error) == ("01" * 16, "ask court", "error")
    assert span.attributes == {"loanmesh.source": "court"}


class FullDisk(TraceFile):
    """Writes nothing, as where there is no room."""

    def __init__(self) -> None:
        self.tried: asyncio.Queue[int] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def write(self, spans: Iterable[Span], logs: Iterable[Log], seen: Mapping[str, tuple[str, float]]) -> None:
        self._loop.call_soon_threadsafe(self.tried.put_nowait, 1)
        raise sqlite3.OperationalError("database or disk is full")


async def test_a_full_disk_is_told_once_and_the_sink_goes_on() -> None:
    file, said = FullDisk(), list[str]()
    sink = Sink(file, FakeClock(), said.append)
    writing = asyncio.create_task(sink.write_forever())
    for _ in range(2):
        sink.take(an_export())
        await file.tried.get()
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    assert said == ["traces are not kept: database or disk is full"]


async def test_what_finds_no_room_is_dropped_and_counted() -> None:
    sink = Sink(FullDisk(), FakeClock(), lambda _: None, waiting_max=3)
    for _ in range(5):
        sink.take(an_export())
    assert sink.dropped == 2
