"""What was done to get one answer of one source: plain notes, told as spans where the answer is missing or slow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest, SourceReport

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.tracing import Place, Recorder, application_of, is_kept, place_of

METHOD = "lending.bureau.v1.BureauService/GatherProfiles"
SLOW_S = 0.5
"""An answer that took this long is told of, though it came in time: half of what a profile may wait."""
_WELL = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND, SourceReport.STATE_NO_CONSENT})


class Try(NamedTuple):
    """One request to a source. Times are monotonic seconds."""

    began: float
    ended: float
    status: int
    """HTTP status; 0 where there was no answer."""
    error: str
    """Type of the error; '' where there was none."""


@dataclass(slots=True)
class Trail:
    """The way to one answer."""

    source: str
    began: float
    ended: float = 0.0
    """0 while it is under way."""
    cause: str = ""
    """Why there is no answer; '' where there is one."""
    detail: str = ""
    """What the breaker saw, where it refused."""
    status: int = 0
    """HTTP status of the try under way; 0 before there is one."""
    tries: list[Try] = field(default_factory=list)


current: ContextVar[Trail | None] = ContextVar("trail", default=None)
"""The trail of the query under way."""
Follow = Callable[
    [Sequence[GatherProfilesRequest.Item], Sequence[CreditProfile], Sequence[Sequence[Trail]], float], None
]
"""Takes items, their profiles, the trails of what was asked for each, and when gathering began."""


class Follower:
    """Tells of each item that asks for it or lacks something: its turn at bureau, each source, each try."""

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self._recorder = recorder
        self._clock = clock

    def __call__(
        self,
        items: Sequence[GatherProfilesRequest.Item],
        profiles: Sequence[CreditProfile],
        trails: Sequence[Sequence[Trail]],
        began: float,
    ) -> None:
        """Judge each item of a batch that was just gathered, and tell of those that are worth it."""
        ended = self._clock.monotonic()
        slow = ended - began >= SLOW_S
        for item, profile, ways in zip(items, profiles, trails, strict=True):
            if not item.traceparent:
                continue
            lacking = [r for r in profile.reports if r.state not in _WELL or r.degradation]
            if lacking or is_kept(item.traceparent) or (slow and any(_took(way, ended) >= SLOW_S for way in ways)):
                self._tell(item, lacking, ways, began, ended)

    def _tell(
        self,
        item: GatherProfilesRequest.Item,
        lacking: Sequence[SourceReport],
        ways: Sequence[Trail],
        began: float,
        ended: float,
    ) -> None:
        at = place_of(item.traceparent)
        if at is None:
            return
        recorder, turn = self._recorder, self._recorder.new_id()
        of = {semconv.APPLICATION_ID: application_of(item.key)}
        recorder.tell(
            METHOD, Place(at.trace_id, turn), at.span_id, recorder.at(began), recorder.at(ended), kind="server",
            attributes={**of, semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: METHOD},
        )  # fmt: skip
        states = {r.source: r for r in lacking}
        for way in ways:
            self._tell_source(way, states.pop(way.source, None), of, Place(at.trace_id, turn), ended)
        for report in states.values():
            # Not asked at all: by a degradation step, or because the cache had something usable.
            recorder.tell(
                f"skip {report.source}", Place(at.trace_id, recorder.new_id()), turn, recorder.at(ended),
                recorder.at(ended), attributes={**of, **_state(report)}, error=report.missing_cause,
            )  # fmt: skip

    def _tell_source(
        self, way: Trail, report: SourceReport | None, of: dict[str, str], turn: Place, ended: float
    ) -> None:
        recorder = self._recorder
        until = way.ended or ended
        # Who does not wait any longer calls it a timeout, whatever becomes of the query.
        cause = way.cause or ("" if way.ended else "timeout")
        attributes: dict[str, str | int | float | bool] = {**of, semconv.SOURCE: way.source}
        if report:
            attributes |= _state(report)
        if cause:
            attributes[semconv.ERROR_TYPE] = cause
        if way.detail:
            attributes[semconv.CAUSE] = way.detail
        asked = Place(turn.trace_id, recorder.new_id())
        only = way.tries[0] if len(way.tries) == 1 else None
        if only:
            attributes |= _http(way.source, only, 0)
        recorder.tell(
            f"ask {way.source}", asked, turn.span_id, recorder.at(way.began), recorder.at(until),
            kind="client" if only else "internal", attributes=attributes, error=cause,
        )  # fmt: skip
        for number, one in enumerate(way.tries if not only else ()):
            recorder.tell(
                f"POST /v1/{way.source}/query", Place(turn.trace_id, recorder.new_id()), asked.span_id,
                recorder.at(one.began), recorder.at(one.ended), kind="client",
                attributes={**of, semconv.SOURCE: way.source, **_http(way.source, one, number)},
                error=one.error or (str(one.status) if one.status >= 400 and one.status != 404 else ""),
            )  # fmt: skip


def _took(way: Trail, now: float) -> float:
    return (way.ended or now) - way.began


def _state(report: SourceReport) -> dict[str, str]:
    said = {
        semconv.SOURCE: report.source,
        semconv.SOURCE_STATE: SourceReport.State.Name(report.state).removeprefix("STATE_").lower(),
    }
    if report.degradation:
        said[semconv.DEGRADATIONS] = report.degradation
    if report.missing_cause:
        said[semconv.ERROR_TYPE] = report.missing_cause
    return said


def _http(source: str, one: Try, number: int) -> dict[str, str | int]:
    said: dict[str, str | int] = {semconv.HTTP_METHOD: "POST", semconv.URL_PATH: f"/v1/{source}/query"}
    if one.status:
        said[semconv.HTTP_STATUS] = one.status
    if one.error:
        said[semconv.EXCEPTION_TYPE] = one.error
    if number:
        said[semconv.HTTP_RESEND] = number
    return said
