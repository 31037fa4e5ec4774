"""A span, a log line and a trace as we read them, wherever they were kept. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loanmesh.runtime import semconv

Value = str | int | float | bool


class CannotRead(Exception):
    """Traces cannot be read where they were looked for; the text says why, and what to do."""


@dataclass(frozen=True)
class Event:
    """Something that happened within a span. `at` is seconds since 1970."""

    at: float
    name: str
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """One span. Ids are hexadecimal, times are seconds since 1970."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    instance: str
    kind: str
    began: float
    ended: float
    error: str
    """What is wrong, in a word; '' where nothing is."""
    attributes: Mapping[str, Value] = field(default_factory=dict)
    events: Sequence[Event] = ()

    @property
    def took_s(self) -> float:
        """How long it took, seconds."""
        return self.ended - self.began

    def text(self, name: str) -> str:
        """An attribute as text; '' where it has none."""
        value = self.attributes.get(name)
        return "" if value is None else str(value)

    @property
    def application(self) -> str:
        """The application's id, where it is of one."""
        return self.text(semconv.APPLICATION_ID)


@dataclass(frozen=True)
class Log:
    """One log line. `at` is seconds since 1970."""

    at: float
    trace_id: str
    service: str
    instance: str
    level: str
    event: str
    attributes: Mapping[str, Value] = field(default_factory=dict)


class Traces(Protocol):
    """Where traces are kept. All raise CannotRead."""

    async def of_application(self, application_id: str) -> list[Span]:
        """All spans of all traces that tell of an application."""
        ...

    async def of_trace(self, trace_id: str) -> list[Span]:
        """All spans of a trace."""
        ...

    async def since(self, at: float) -> list[Span]:
        """Spans that ended after `at`, of traces in which something was wrong, oldest first."""
        ...

    async def logs(self, trace_id: str, began: float, ended: float) -> list[Log]:
        """Lines of a trace, and those that warn of anything at that time; empty where logs are kept elsewhere."""
        ...

    async def last_seen(self) -> Mapping[str, float]:
        """When each process last told anything, by its name; empty where that is not known."""
        ...
