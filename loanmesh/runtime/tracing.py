"""Spans told after the fact: what went wrong is traced in full, though nobody knew beforehand that it would.

A span that the SDK records as it happens costs 58 us, one that it begins and does not record 20 us, and whether an
application is worth it shows only at its end. So all processes keep plain notes (times, words), and tell them as spans
when the trace was sampled or something was wrong: failed, deferred, degraded, late, shed. Every application has a trace
from its caller's call on, told or not, so that what several processes tell of it falls into one. Costs in CPU: 2 us for
a healthy call; a span that is told 6 us where it is told and 8 us in the exporter's thread.
"""

from __future__ import annotations

import random
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import Clock

Attributes = Mapping[str, str | int | float | bool]
CALLS_MAX = 10_000
"""Ended calls remembered, in case what they brought turns out to be worth a trace: some seconds at full load."""
TEXT_MAX = 300
"""Longest text of a cause that is kept, characters."""
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_KINDS = {kind.name.lower(): kind for kind in SpanKind}
_DRAWN_BITS = 64
"""Sampling looks at the lowest bits of a trace's id, as the SDK's own sampler does, so that all who look agree."""


class Place(NamedTuple):
    """A span's place: its trace and itself."""

    trace_id: int
    span_id: int

    def traceparent(self, kept: bool) -> str:
        """As W3C writes it; `kept` says that others should keep theirs too."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if kept else '00'}"


class Span:
    """A call under way: told at its end where it is kept, or where its end shows that it is worth it."""

    __slots__ = ("at", "brings", "items", "kept", "parent")

    def __init__(self, at: Place, parent: int, kept: bool) -> None:
        self.at = at
        self.parent = parent
        """Its parent's span id in the same trace; 0 for none."""
        self.kept = kept
        """Whether it is told in any case, and everybody told to do so too."""
        self.brings = False
        """Whether something was stored under its place, which may yet turn out to be worth the span."""
        self.items: list[Span] = []
        """The same call as those see it who are served together by it, each in a trace of its own."""

    @property
    def traceparent(self) -> str:
        """What those who are called within are told of it."""
        return self.at.traceparent(self.kept)


class Call(NamedTuple):
    """A call that ended: enough to tell its span later. Times are monotonic seconds."""

    name: str
    kind: str
    at: Place
    parent: int
    began: float
    ended: float
    status: str
    """Its gRPC status."""
    said: Attributes
    """What else is to be said of it."""
    error: str


class Recorder:
    """Tells spans to whoever collects those of a provider.

    provider  the SDK's; what it records by itself and what is told here leave the process together.
    sample_ratio  share of new traces that are kept though nothing is wrong; of others' traces, they decide.
    """

    def __init__(self, provider: TracerProvider, clock: Clock, dice: random.Random, sample_ratio: float = 0.0) -> None:
        # Private, since the SDK lets only spans in that it began itself; a test holds it to the pinned version.
        self._processor = provider._active_span_processor
        self._resource = provider.resource
        self._scope = InstrumentationScope("loanmesh")
        self._clock = clock
        self._dice = dice
        self._kept_below = int(sample_ratio * 2**_DRAWN_BITS)
        self._calls: OrderedDict[int, Call | None] = OrderedDict()
        self.told = 0
        """Spans told since the start."""

    def new_id(self) -> int:
        """A span id that no other span of its trace has."""
        return self._dice.getrandbits(64) or 1

    def begin(self, traceparent: str) -> Span:
        """A span within the one that `traceparent` names; in a new trace where it names none."""
        caller = place_of(traceparent)
        if caller:
            return Span(Place(caller.trace_id, self.new_id()), caller.span_id, is_kept(traceparent))
        trace_id = self._dice.getrandbits(128) or 1
        return Span(Place(trace_id, self.new_id()), 0, trace_id % 2**_DRAWN_BITS < self._kept_below)

    def at(self, monotonic: float) -> float:
        """Seconds since 1970 of a moment by the monotonic clock."""
        return self._clock.now().timestamp() - (self._clock.monotonic() - monotonic)

    def tell(
        self,
        name: str,
        at: Place,
        parent: int,
        began: float,
        ended: float,
        *,
        kind: str = "internal",
        attributes: Attributes | None = None,
        error: str = "",
        links: Sequence[Place] = (),
        events: Sequence[tuple[str, float, Attributes]] = (),
    ) -> None:
        """One span. Times are seconds since 1970.

        parent  span id of its parent in the same trace; 0 for none.
        error   what is wrong, in a stable word or a status; empty: nothing.
        """
        self.told += 1
        if attributes and semconv.EXCEPTION_TYPE in attributes:
            # Its type alone: a text or a stack may quote whom the call was about.
            raised = {semconv.EXCEPTION_TYPE: attributes[semconv.EXCEPTION_TYPE]}
            events = [*events, ("exception", ended, raised)]
        status = Status(StatusCode.ERROR, error) if error else Status()
        self._processor.on_end(
            ReadableSpan(
                name,
                context=SpanContext(at.trace_id, at.span_id, False, _SAMPLED),
                parent=SpanContext(at.trace_id, parent, True, _SAMPLED) if parent else None,
                resource=self._resource,
                attributes=attributes or {},
                events=[Event(said, dict(facts), int(when * 1e9)) for said, when, facts in events],
                links=[Link(SpanContext(one.trace_id, one.span_id, True, _SAMPLED)) for one in links],
                kind=_KINDS[kind],
                status=status,
                start_time=int(began * 1e9),
                end_time=max(int(began * 1e9), int(ended * 1e9)),
                instrumentation_scope=self._scope,
            )
        )

    def tell_call(self, call: Call) -> None:
        """The span of a call that ended."""
        attributes = {semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: call.name,
                      semconv.RPC_STATUS_CODE: call.status, **call.said}  # fmt: skip
        if call.error:
            attributes.setdefault(semconv.ERROR_TYPE, call.error)
        self.tell(
            call.name, call.at, call.parent, self.at(call.began), self.at(call.ended), kind=call.kind,
            attributes=attributes, error=call.error,
        )  # fmt: skip

    def ended(self, call: Call, keep: bool) -> None:
        """A call ended that brought something: tell it, or remember it in case somebody asks."""
        wanted = keep or (call.at.span_id in self._calls)
        if wanted:
            self.tell_call(call)
        self._remember(call.at.span_id, None if wanted else call)

    def keep(self, at: Place) -> bool:
        """Somebody found that what a call brought is worth its span: told once, now or when it ends.

        False where this process knows of no such call, so that it may have been another's.
        """
        if at.span_id in self._calls:
            call = self._calls[at.span_id]
            if call:
                self.tell_call(call)
                self._calls[at.span_id] = None
            return True
        self._remember(at.span_id, None)
        return False

    def has_told(self, at: Place) -> bool:
        """Whether something of what the call brought was told already, as far as is remembered here."""
        return self._calls.get(at.span_id, at) is None

    def _remember(self, span_id: int, call: Call | None) -> None:
        self._calls[span_id] = call
        while len(self._calls) > CALLS_MAX:
            self._calls.popitem(last=False)


_recorder: Recorder | None = None
_current: ContextVar[Span | None] = ContextVar("span", default=None)


def start(recorder: Recorder | None) -> None:
    """Let this process tell its spans to `recorder`; None: to nobody."""
    global _recorder
    _recorder = recorder


def recorder() -> Recorder | None:
    """Who takes what this process has to tell; None where nothing is exported."""
    return _recorder


def beside(provider: object, clock: Clock, dice: random.Random) -> Recorder | None:
    """A recorder beside a provider that somebody else has set up, as a caller's own; None where it is not the SDK's."""
    return Recorder(provider, clock, dice) if isinstance(provider, TracerProvider) else None


def place_of(traceparent: str) -> Place | None:
    """The place that a traceparent names; None where it names none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    place = Place(int(found[1], 16), int(found[2], 16)) if found else None
    return place if place and place.trace_id and place.span_id else None


def is_kept(traceparent: str) -> bool:
    """Whether the trace is recorded: the last two digits are flags, the lowest of which says so."""
    return traceparent[-1:] in ("1", "3", "5", "7", "9", "b", "d", "f")


def enter(traceparent: str) -> Span | None:
    """A call came in: its span is the current one for the rest of the task. Where nothing is exported it is the
    caller's own, so that what is called within still falls into the caller's trace."""
    if _recorder:
        span: Span | None = _recorder.begin(traceparent)
    else:
        caller = place_of(traceparent)
        span = caller and Span(caller, 0, is_kept(traceparent))
    _current.set(span)
    return span


def current() -> Span | None:
    """The span of the call under way."""
    return _current.get()


def current_traceparent(item: str = "", own: bool = False) -> str:
    """The W3C trace context of the call under way, to be kept with what it brought; '' where there is none.

    item  within which span the caller submitted this one, where the call is for several; else ''.
    own   whether an item has a trace of its own where its caller named none at all.
    """
    span = _current.get()
    place = place_of(item) if item else None
    if span is None or not _recorder:
        return item if place else span.traceparent if span else ""
    if (place and place != (span.at.trace_id, span.parent)) or (own and not place and not span.parent):
        begun: Span = _recorder.begin(item)
        span.items.append(begun)
        span = begun
    span.brings = True
    return span.traceparent


def application_of(key: str) -> str:
    """The application's id in an assessment's name; '' where the key is none."""
    parts = key.split("/")
    return parts[3] if len(parts) > 3 else ""


def short(text: str | None) -> str:
    """A cause's text as spans may hold it."""
    return " ".join((text or "").split())[:TEXT_MAX]


@contextmanager
def apart(at: Place) -> Iterator[None]:
    """What is called within belongs to a trace of its own, which is not kept."""
    token = _current.set(Span(at, 0, False))
    try:
        yield
    finally:
        _current.reset(token)
