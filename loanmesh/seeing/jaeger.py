"""Traces from a Jaeger: its query service's JSON over HTTP, as its own pages read it (`/api/traces`, Jaeger 1 and 2).

That API rather than gRPC's api_v3: it needs no generated code, passes proxies, and other trace stores speak it too.
Jaeger keeps no logs and does not know when a process was last heard of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.seeing.spans import CannotRead, Event, Log, Span, Value

TIMEOUT_S = 20.0
LIMIT = 1500
"""Most traces that one question asks for: Jaeger's own limit."""
LOOK_BACK_S = 7 * 86_400.0
_WRONG_WITHOUT_ERROR = ("late", "degraded", "slow", "lost_lease")
"""Why a trace is kept though none of intake's spans in it is an error."""
_SERVICES = ("intake", "bureau")
"""Who is asked for first: an application's trace always passes intake; bureau's are a second chance."""


class JaegerTraces:
    """See Traces.

    address  `http://HOST:PORT` of the query service, with its base path where it has one.
    """

    def __init__(self, address: str, clock: Clock | None = None) -> None:
        self._address = address.rstrip("/")
        self._clock = clock or SystemClock()

    async def of_application(self, application_id: str) -> list[Span]:
        """See Traces."""
        for service in _SERVICES:
            found = await self._search(service, {semconv.APPLICATION_ID: application_id}, LOOK_BACK_S)
            if found:
                return found
        return []

    async def of_trace(self, trace_id: str) -> list[Span]:
        """See Traces."""
        return await self._get(f"/api/traces/{trace_id}", {})

    async def since(self, at: float) -> list[Span]:
        """See Traces."""
        back_s = self._clock.now().timestamp() - at
        found: dict[tuple[str, str], Span] = {}
        for tags in ({"error": "true"}, *({semconv.KEPT_FOR: why} for why in _WRONG_WITHOUT_ERROR)):
            for span in await self._search("intake", tags, back_s):
                found[span.trace_id, span.span_id] = span
        return sorted(found.values(), key=lambda span: span.began)

    async def logs(self, trace_id: str, began: float, ended: float) -> list[Log]:
        """None: Jaeger keeps no logs."""
        return []

    async def last_seen(self) -> Mapping[str, float]:
        """Nothing: Jaeger does not know."""
        return {}

    async def _search(self, service: str, tags: dict[str, str], back_s: float) -> list[Span]:
        now_us = int(self._clock.now().timestamp() * 1e6)
        asked = {
            "service": service, "tags": json.dumps(tags), "start": str(now_us - int(back_s * 1e6)),
            "end": str(now_us), "limit": str(LIMIT),
        }  # fmt: skip
        return await self._get("/api/traces", asked)

    async def _get(self, path: str, query: dict[str, str]) -> list[Span]:
        url = f"{self._address}{path}"
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session,
                session.get(url, params=query) as answer,
            ):
                if answer.status == 404:
                    return []
                if answer.status != 200:
                    raise CannotRead(f"Jaeger at {self._address} answered {answer.status} to {path}")
                said = json.loads(await answer.text())
            return [span for trace in said.get("data") or () for span in _spans(trace)]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise CannotRead(
                f"no Jaeger at {self._address} ({type(error).__name__}); --jaeger must name its query service,"
                " as http://jaeger-query:16686"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CannotRead(f"what {self._address} answered is no answer of a Jaeger's") from error


def _spans(trace: Mapping[str, Any]) -> Iterable[Span]:
    for span in trace["spans"]:
        process = trace["processes"][span["processID"]]
        facts = _tags(span.get("tags"))
        error = facts.pop("error", False) in (True, "true") or facts.get("otel.status_code") == "ERROR"
        text = str(facts.pop("otel.status_description", "") or facts.get(semconv.ERROR_TYPE, "") or "error")
        began = span["startTime"] / 1e6
        yield Span(
            trace_id=str(span["traceID"]).rjust(32, "0"),
            span_id=span["spanID"],
            parent_id=next((r["spanID"] for r in span.get("references") or () if r["refType"] == "CHILD_OF"), ""),
            name=span["operationName"],
            service=process["serviceName"],
            instance=str(_tags(process.get("tags")).get("service.instance.id", "")),
            kind=str(facts.pop("span.kind", "internal")),
            began=began,
            ended=began + span["duration"] / 1e6,
            error=text if error else "",
            attributes=facts,
            events=tuple(_event(log) for log in span.get("logs") or ()),
        )


def _event(log: Mapping[str, Any]) -> Event:
    facts = _tags(log["fields"])
    return Event(log["timestamp"] / 1e6, str(facts.pop("event", "event")), facts)


def _tags(tags: Iterable[Mapping[str, Any]] | None) -> dict[str, Value]:
    return {tag["key"]: tag["value"] for tag in tags or ()}
