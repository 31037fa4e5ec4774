"""Spans for tests: only what matters is named."""

from __future__ import annotations

from collections.abc import Mapping

from loanmesh.runtime import semconv
from loanmesh.seeing.spans import Span, Value


def a_span(
    name: str = "process applications",
    *,
    trace: str = "aa",
    span_id: str = "01",
    parent: str = "",
    service: str = "intake",
    instance: str = "i-1",
    kind: str = "consumer",
    began: float = 1.0,
    ended: float = 2.0,
    error: str = "",
    application: str = "",
    kept_for: str = "",
    attributes: Mapping[str, Value] | None = None,
) -> Span:
    """One span."""
    said = {semconv.APPLICATION_ID: application, semconv.KEPT_FOR: kept_for}
    facts = {**{k: v for k, v in said.items() if v}, **(attributes or {})}
    return Span(trace.rjust(32, "0"), span_id, parent, name, service, instance, kind, began, ended, error, facts)
