"""What bureau tells of an item: each source that was asked, each try, and why one is missing."""

from __future__ import annotations

import random

import pytest
from lending.bureau.v1.bureau_service_pb2 import GatherProfilesRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.tracing import Recorder
from services.bureau.gather import Gatherer
from services.bureau.trail import Follower, Try, current
from tests.builders import an_application
from tests.unit.test_bureau_gather import Court, a_bureau

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
KEY = "lenders/demo/applications/a1/assessments/1"


def followed(does: str | None) -> tuple[Gatherer, InMemorySpanExporter]:
    clock, exporter, provider = FakeClock(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def answer() -> str | None:
        if does and (trail := current.get()):
            trail.tries += [Try(0.0, 0.1, 503, "Down"), Try(0.2, 0.3, 0, "ServerDisconnectedError")]
        return does

    gatherer, _ = a_bureau(Court(clock, answer))
    gatherer._follow = Follower(Recorder(provider, clock, random.Random(1)), clock)
    return gatherer, exporter


def an_item(flags: str) -> GatherProfilesRequest.Item:
    application = an_application("person", 1)
    return GatherProfilesRequest.Item(
        key=KEY, lender="lenders/demo", party=application.parties[0], consents=application.consents,
        traceparent=TRACEPARENT + flags if flags else "",
    )  # fmt: skip


def named(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_missing_source_is_told_with_every_try_though_nobody_asked_for_it() -> None:
    gatherer, exporter = followed("unavailable")
    await gatherer.gather([an_item("00")])
    spans = named(exporter)
    turn, court = spans["lending.bureau.v1.BureauService/GatherProfiles"], spans["ask court"]
    assert turn.parent
    assert f"{turn.parent.span_id:016x}" == TRACEPARENT.split("-")[2]
    assert court.status.description == "unavailable"
    tries = [span for span in exporter.get_finished_spans() if span.name == "POST /v1/court/query"]
    assert [dict(span.attributes or {}).get(semconv.HTTP_STATUS) for span in tries] == [503, None]
    assert [dict(span.attributes or {}).get(semconv.HTTP_RESEND) for span in tries] == [None, 1]
    assert all(dict(span.attributes or {})[semconv.APPLICATION_ID] == "a1" for span in exporter.get_finished_spans())


@pytest.mark.parametrize(("flags", "told"), [("00", False), ("01", True), ("", False)])
async def test_where_all_is_well_only_a_followed_item_is_told(flags: str, told: bool) -> None:
    gatherer, exporter = followed(None)
    await gatherer.gather([an_item(flags)])
    assert bool(exporter.get_finished_spans()) is told
    said = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert an_item("").party.identity.value not in said
