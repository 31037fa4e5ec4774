"""Bureau, scoring and pricing over gRPC: the pipeline's ports as batch calls.

A call that fails makes every case of its batch wait; it never raises. Retries are the channel's, nobody else's. Each
service stands behind a guard of its own: while its breaker is open, nothing is sent and the cases wait for it.

Requests are filled in place: a message given to another's constructor, or to a list of them, is written and read once
more each time, and a profile would be so four times on its way to pricing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, EraseSubjectRequest, GatherProfilesRequest
from lending.bureau.v1.bureau_service_pb2_grpc import BureauServiceStub
from lending.pricing.v1.pricing_service_pb2 import (
    PriceApplicationsRequest,
    Pricing,
    ScheduleRepaymentsRequest,
    ScheduleRepaymentsResponse,
)
from lending.pricing.v1.pricing_service_pb2_grpc import PricingServiceStub
from lending.scoring.v1.scoring_service_pb2 import Score, ScoreProfilesRequest
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceStub
from lending.type.v1.offer_pb2 import Offer
from lending.type.v1.party_pb2 import Identity

from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.guard import Guard, Refused, Verdict
from loanmesh.runtime.status import code_of, error_info, is_too_large, verdict_of
from services.intake.ports import Answer, Broken, Case, Unavailable, Unfit

# Above bureau's gather budget of a second, so that it answers with what it has before we give up.
DEADLINES_S = {"GatherProfiles": 3.0, "ScoreProfiles": 2.0, "PriceApplications": 2.0, "ScheduleRepayments": 1.0}
_NOT_NOW = frozenset({
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED,
})  # fmt: skip
"""Said of one item: nothing is wrong with it, its time will come."""
log = structlog.get_logger()
T = TypeVar("T", CreditProfile, Score, Pricing)
S = TypeVar("S")


def deadline_s(method: str) -> float:
    """Longest time a call may take, seconds."""
    return DEADLINES_S.get(method.rsplit("/", 1)[-1], 2.0)


def key_of(case: Case) -> str:
    """The assessment's name: lenders/{lender}/applications/{id}/assessments/{n}."""
    return f"{case.claim.lender}/applications/{case.claim.id}/assessments/{case.claim.assessment}"


class GrpcBureau:
    """Gathers profiles from the bureau service."""

    def __init__(self, channel: grpc.aio.Channel, guard: Guard) -> None:
        self._guard = guard
        self._stub = BureauServiceStub(channel)

    async def gather(self, cases: Sequence[Case]) -> Sequence[CreditProfile | Answer]:
        """One profile a case."""

        async def call(cases: Sequence[Case]) -> list[CreditProfile | Status]:
            request = GatherProfilesRequest()
            for case in cases:
                item = request.items.add(key=key_of(case), lender=case.claim.lender, traceparent=case.traceparent)
                item.party.CopyFrom(case.party)
                item.consents.extend(case.application.consents)
            answer = await self._stub.GatherProfiles(request)
            if not _are_of(answer.results, request.items):
                return []
            return [r.profile if r.WhichOneof("outcome") == "profile" else r.error for r in answer.results]

        return await _ask(self._guard, cases, call)

    async def erase_subject(self, lender: str, kind: int, number: str, *, only_count: bool) -> int:
        """Delete what is cached of a subject. Raises DependencyDown."""
        identity = Identity(kind=Identity.Kind.Name(kind), value=number)  # type: ignore[arg-type]  # One of its own.
        request = EraseSubjectRequest(lender=lender, identity=identity, validate_only=only_count)
        try:
            return int((await self._stub.EraseSubject(request)).answers_erased)
        except grpc.aio.AioRpcError as error:
            raise DependencyDown(f"bureau does not answer: {error.code().name}") from None


class GrpcScoring:
    """Scores profiles with the scoring service."""

    def __init__(self, channel: grpc.aio.Channel, guard: Guard) -> None:
        self._guard = guard
        self._stub = ScoringServiceStub(channel)

    async def score(self, cases: Sequence[Case]) -> Sequence[Score | Answer]:
        """One score a case."""

        async def call(cases: Sequence[Case]) -> list[Score | Status]:
            request = ScoreProfilesRequest()
            for case in cases:
                item = request.items.add(
                    key=key_of(case),
                    party_kind=case.party.kind,
                    age_years=case.age_years,
                    traceparent=case.traceparent,
                )
                item.profile.CopyFrom(case.gathered)
                item.declaration.CopyFrom(case.application.declaration)
            answer = await self._stub.ScoreProfiles(request)
            if not _are_of(answer.results, request.items):
                return []
            return [r.score if r.WhichOneof("outcome") == "score" else r.error for r in answer.results]

        return await _ask(self._guard, cases, call)


class GrpcPricing:
    """Prices applications with the pricing service."""

    def __init__(self, channel: grpc.aio.Channel, guard: Guard) -> None:
        self._guard = guard
        self._stub = PricingServiceStub(channel)

    async def price(self, cases: Sequence[Case]) -> Sequence[Pricing | Answer]:
        """One pricing a case."""

        async def call(cases: Sequence[Case]) -> list[Pricing | Status]:
            request = PriceApplicationsRequest()
            for case in cases:
                item = request.items.add(
                    key=key_of(case),
                    lender=case.claim.lender,
                    party_kind=case.party.kind,
                    age_years=case.age_years,
                    traceparent=case.traceparent,
                )
                item.loan.CopyFrom(case.application.loan)
                item.declaration.CopyFrom(case.application.declaration)
                item.profile.CopyFrom(case.gathered)
                item.score.CopyFrom(case.scored)
                if case.as_of:
                    item.as_of_time.CopyFrom(_timestamp(case.as_of))
            answer = await self._stub.PriceApplications(request)
            if not _are_of(answer.results, request.items):
                return []
            return [r.pricing if r.WhichOneof("outcome") == "pricing" else r.error for r in answer.results]

        return await _ask(self._guard, cases, call)

    async def schedules(self, offers: Sequence[Offer]) -> ScheduleRepaymentsResponse:
        """Repayment schedules of offers, in order. Raises DependencyDown."""
        items = [
            ScheduleRepaymentsRequest.Item(principal_fen=o.principal_fen, apr_ppm=o.apr_ppm, term_months=o.term_months)
            for o in offers
        ]

        async def call() -> ScheduleRepaymentsResponse:
            return await self._stub.ScheduleRepayments(ScheduleRepaymentsRequest(items=items))

        try:
            said = await self._guard.call(lambda: _said(call), _verdict_within_callers_deadline)
        except Refused as refused:
            raise DependencyDown(
                f"pricing cannot be asked for schedules: {refused.cause}", refused.retry_s
            ) from refused
        if isinstance(said, grpc.aio.AioRpcError):
            raise DependencyDown(f"pricing cannot be reached for schedules: {said.code().name}") from said
        return said


class _Keyed(Protocol):
    key: str


def _are_of(results: Iterable[_Keyed], items: Iterable[_Keyed]) -> bool:
    """Whether an answer has one result an item, in their order: else one applicant would be decided on another's."""
    if [result.key for result in results] == [item.key for item in items]:
        return True
    log.error("results_of_other_items")
    return False


async def _ask(
    guard: Guard, cases: Sequence[Case], call: Callable[[Sequence[Case]], Awaitable[list[T | Status]]]
) -> Sequence[T | Answer]:
    count = len(cases)

    def judge(said: list[T | Status] | grpc.aio.AioRpcError) -> Verdict:
        if isinstance(said, grpc.aio.AioRpcError):
            return Verdict.NONE if is_too_large(said.code(), said.details()) else verdict_of(said.code())
        return Verdict.WELL if len(said) == count else Verdict.ILL

    try:
        said = await guard.call(lambda: _said(lambda: call(cases)), judge)
    except Refused as refused:
        full = refused.cause == "bulkhead_full"
        detail = "" if full else guard.breaker.cause
        return [
            Unavailable(f"{guard.name}_{refused.cause}", refused.retry_s or None, overloaded=full, detail=detail)
        ] * count
    if isinstance(said, grpc.aio.AioRpcError):
        too_large = is_too_large(said.code(), said.details())
        if said.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and not too_large:
            return [Unavailable(f"{guard.name}_overloaded", overloaded=True, status=said.code().name)] * count
        if said.code() == grpc.StatusCode.INVALID_ARGUMENT or too_large:
            log.warning("batch_refused", dependency=guard.name, count=count)
            if count > 1:
                # One that cannot be answered must not hold up those beside it: halves find it in a few calls. Only
                # where the fault is the request's: a service that is ill must not be asked more for it.
                halves = (cases[: count // 2], cases[count // 2 :])
                return [answer for half in halves for answer in await _ask(guard, half, call)]
            return [Broken(f"{guard.name}_refused", said.code().name)]
        return [Unavailable(f"{guard.name}_unavailable", status=said.code().name, detail=_said_of(said))] * count
    if len(said) != count:
        return [Unavailable(f"{guard.name}_error")] * count
    return [_unpack(guard.name, answer) if isinstance(answer, Status) else answer for answer in said]


def _said_of(error: grpc.aio.AioRpcError) -> str:
    """What the transport said, after what the channel found out about it."""
    return ": ".join([*getattr(error, "__notes__", ()), error.details() or ""])


async def _said(call: Callable[[], Awaitable[S]]) -> S | grpc.aio.AioRpcError:
    """A failed call as a value: for the guard it is an outcome to be judged."""
    try:
        return await call()
    except grpc.aio.AioRpcError as error:
        return error


def _verdict_within_callers_deadline(said: ScheduleRepaymentsResponse | grpc.aio.AioRpcError) -> Verdict:
    if not isinstance(said, grpc.aio.AioRpcError):
        return Verdict.WELL
    # The caller's deadline shortens this call: that its time was up says nothing of pricing.
    return Verdict.NONE if said.code() == grpc.StatusCode.DEADLINE_EXCEEDED else verdict_of(said.code())


def _unpack(service: str, status: Status) -> Answer:
    info = error_info(status)
    if info and info.reason == "MISSING_EVIDENCE":
        return Unavailable("source_missing", missing_sources=tuple(info.metadata["sources"].split(",")))
    if code_of(status) == grpc.StatusCode.INVALID_ARGUMENT:
        return Unfit(_field(status), info.reason if info else "INVALID_REQUEST")
    if code_of(status) in _NOT_NOW:
        return Unavailable(f"{service}_unavailable", overloaded=code_of(status) == grpc.StatusCode.RESOURCE_EXHAUSTED)
    return Broken(f"{service}_error", info.metadata["error_type"] if info else code_of(status).name)


@lru_cache(maxsize=16)  # One of all in a batch; to be copied from.
def _timestamp(at: dt.datetime) -> Timestamp:
    made = Timestamp()
    made.FromDatetime(at)
    return made


def _field(status: Status) -> str:
    from google.rpc.error_details_pb2 import BadRequest

    bad = BadRequest()
    found = next((bad for detail in status.details if detail.Unpack(bad)), None)
    return found.field_violations[0].field if found and found.field_violations else "application"
