"""Traces read from a Jaeger: a small server that speaks its query service's JSON."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import FakeClock
from loanmesh.seeing.causes import why_failed
from loanmesh.seeing.jaeger import JaegerTraces
from loanmesh.seeing.spans import CannotRead

TRACE_ID, APPLICATION = "0af7651916cd43dd8448eb211c80319c", "01a2105c-9d52-75e1-9cb3-029871b06bfa"
CLOCK = FakeClock()


def tag(key: str, value: str | bool | int) -> dict[str, Any]:
    return {"key": key, "type": {str: "string", bool: "bool", int: "int64"}[type(value)], "value": value}


def a_trace() -> dict[str, Any]:
    began_us = int(CLOCK.now().timestamp() * 1e6) - 5_000_000
    return {
        "traceID": TRACE_ID,
        "spans": [
            {
                "traceID": TRACE_ID, "spanID": "b7ad6b7169203331", "operationName": "process applications",
                "references": [], "startTime": began_us, "duration": 100_000, "processID": "p1", "warnings": None,
                "tags": [tag(semconv.APPLICATION_ID, APPLICATION), tag("span.kind", "consumer"), tag("error", True),
                         tag("otel.status_code", "ERROR"), tag("otel.status_description", "source_missing:court")],
                "logs": [{"timestamp": began_us + 50, "fields": [tag("event", "attempt_failed"), tag("attempt", 1)]}],
            },
            {
                "traceID": TRACE_ID, "spanID": "00f067aa0ba902b7", "operationName": "ask court",
                "references": [{"refType": "CHILD_OF", "traceID": TRACE_ID, "spanID": "b7ad6b7169203331"}],
                "startTime": began_us + 10, "duration": 900, "processID": "p2", "logs": [],
                "tags": [tag(semconv.APPLICATION_ID, APPLICATION), tag(semconv.SOURCE, "court"), tag("error", True),
                         tag("span.kind", "client"), tag("otel.status_description", "unavailable")],
            },
        ],
        "processes": {
            "p1": {"serviceName": "intake", "tags": [tag("service.instance.id", "intake-1-a")]},
            "p2": {"serviceName": "bureau", "tags": []},
        },
        "warnings": None,
    }  # fmt: skip


class Jaeger:
    """Answers searches as the query service does, and remembers them."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/api/traces", self.search)
        app.router.add_get("/api/traces/{id}", self.get)
        return app

    async def search(self, request: web.Request) -> web.Response:
        self.asked.append(dict(request.query))
        if "service" not in request.query:
            return self._answer([], 400)
        wanted = json.loads(request.query.get("tags", "{}"))
        spans = a_trace()["spans"]
        held = [{t["key"]: str(t["value"]).lower() for t in span["tags"]} for span in spans]
        found = any(all(tags.get(key) == str(value).lower() for key, value in wanted.items()) for tags in held)
        return self._answer([a_trace()] if found else [], 200)

    async def get(self, request: web.Request) -> web.Response:
        known = request.match_info["id"] == TRACE_ID
        return self._answer([a_trace()] if known else [], 200 if known else 404)

    def _answer(self, data: list[Any], status: int) -> web.Response:
        errors = None if status == 200 else [{"code": status, "msg": "trace not found"}]
        body = {"data": data or None, "total": 0, "limit": 0, "offset": 0, "errors": errors}
        return web.json_response(body, status=status)


@pytest.fixture
async def jaeger() -> AsyncIterator[tuple[Jaeger, JaegerTraces]]:
    server = Jaeger()
    async with TestServer(server.app()) as running:
        yield server, JaegerTraces(f"http://127.0.0.1:{running.port}/", CLOCK)


async def test_an_application_is_found_by_its_id(jaeger: tuple[Jaeger, JaegerTraces]) -> None:
    server, traces = jaeger
    attempt, court = await traces.of_application(APPLICATION)
    assert (attempt.service, attempt.instance, attempt.error) == ("intake", "intake-1-a", "source_missing:court")
    assert (court.parent_id, court.kind, court.error) == (attempt.span_id, "client", "unavailable")
    assert [event.name for event in attempt.events] == ["attempt_failed"]
    assert json.loads(server.asked[0]["tags"]) == {"loanmesh.application_id": APPLICATION}
    assert int(server.asked[0]["start"]) < int(server.asked[0]["end"])
    assert await traces.of_application("01a2105c-9d52-75e1-9cb3-000000000000") == []


async def test_causes_are_read_from_jaeger_too(jaeger: tuple[Jaeger, JaegerTraces]) -> None:
    _, traces = jaeger
    (group,) = why_failed(await traces.since(CLOCK.now().timestamp() - 60), {})
    assert (group.cause.kind, group.example) == ("source_down", APPLICATION)


async def test_a_trace_that_is_not_there_is_empty(jaeger: tuple[Jaeger, JaegerTraces]) -> None:
    _, traces = jaeger
    assert len(await traces.of_trace(TRACE_ID)) == 2
    assert await traces.of_trace("0" * 32) == []


async def test_nobody_there_is_said_plainly() -> None:
    with pytest.raises(CannotRead, match="--jaeger"):
        await JaegerTraces("http://127.0.0.1:1", CLOCK).of_trace(TRACE_ID)
