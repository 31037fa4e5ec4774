"""Follows each application through its batch, and has what went wrong traced in full. Knows Protocols only.

Who is on the way together shares times: so the notes of a batch are a few numbers, and one application costs about a
microsecond of them. At the end each one is judged: sampled, tried before, deferred, failed, degraded, late? Then its
attempt is told as spans in its own trace: the wait, the attempt, and under it one span for each hop and the commit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1.intake_service_pb2 import PRIORITY_BULK, PRIORITY_PARTNER, PRIORITY_REASSESSMENT
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.tracing import Place, Recorder, apart, is_kept, place_of, short
from services.intake.application import Claim, New
from services.intake.ports import (
    Answer,
    Broken,
    Bureau,
    Case,
    Decided,
    Deferred,
    Parked,
    Pricer,
    Result,
    Scoring,
    Settlement,
    Unavailable,
    Unfit,
)

T = TypeVar("T")
A = TypeVar("A", CreditProfile, Score, Pricing)
WAIT_SHOWN_S = 0.05
"""A wait in the queue from which on it has a span of its own."""
METHODS = {
    "gather": "lending.bureau.v1.BureauService/GatherProfiles",
    "score": "lending.scoring.v1.ScoringService/ScoreProfiles",
    "price": "lending.pricing.v1.PricingService/PriceApplications",
}
ATTEMPT = "process applications"
COMMIT = "settle applications"
STORE = "accept applications"
SLOW_COMMIT_S = 0.5
"""A commit that takes this long is told of by itself: it makes callers wait."""
PATIENCE: dict[int, float] = {PRIORITY_PARTNER: 2.0, PRIORITY_BULK: 10.0, PRIORITY_REASSESSMENT: 30.0}
"""How many times as old as an interactive one an application of a class is when its decision is late: for what is sent
to be decided some time, a turn in the queue is nothing to look into."""
CROWD_A_SECOND = 50.0
"""Of those that were decided with nothing wrong but late, so many a second are told of, and as many more at once: in a
backlog all are, for one reason, and telling of each would make it a tenth longer."""
LOST = "lost attempt"
WAIT = "wait for a turn"


@dataclass(slots=True)
class _Stage:
    """One call for several of the batch. Times are monotonic seconds."""

    name: str
    span: int
    cases: Sequence[Case]
    began: float
    ended: float = 0.0
    gaps: dict[str, Answer] = field(default_factory=dict)
    error: str = ""
    _ids: frozenset[str] | None = None

    def asked_for(self, application_id: str) -> bool:
        """Whether the application was among those of the call."""
        if self._ids is None:
            self._ids = frozenset(case.claim.id for case in self.cases)
        return application_id in self._ids


@dataclass(slots=True)
class _Batch:
    """A batch under way."""

    at: Place
    attempt: int
    kept: Mapping[str, str]
    """Applications known from the start to be worth their trace, and why."""
    stages: list[_Stage] = field(default_factory=list)
    epoch_s: float = 0.0
    """Seconds since 1970 when the monotonic clock was zero: read once, since hundreds of times are told of a batch."""


class Following:
    """Wraps the pipeline's ports and its one function; changes nothing of what they say.

    owner   names this replica, as in leases.
    slow_s  from which age on the decision of an interactive application is late.
    report  called where a span could not be told, which must never cost a decision.
    """

    def __init__(
        self, recorder: Recorder, clock: Clock, owner: str, slow_s: float, lease_s: float, report: Callable[..., None]
    ) -> None:
        self._recorder = recorder
        self._clock = clock
        self._owner = owner
        self._slow_s = slow_s
        self._lease_s = lease_s
        self._report = report
        self._current: ContextVar[_Batch | None] = ContextVar("batch", default=None)
        self._crowd_room, self._crowd_at = CROWD_A_SECOND, clock.monotonic()

    # --- The ports, timed ---

    def bureau(self, bureau: Bureau) -> Bureau:
        """Bureau, followed."""
        return _Bureau(self, bureau)

    def scoring(self, scoring: Scoring) -> Scoring:
        """Scoring, followed."""
        return _Scoring(self, scoring)

    def pricing(self, pricing: Pricer) -> Pricer:
        """Pricing, followed."""
        return _Pricing(self, pricing)

    def store(self, store: Settlement) -> Settlement:
        """The store, followed."""
        return _Store(self, store)

    async def asked(
        self,
        name: str,
        cases: Sequence[Case],
        ask: Callable[[Sequence[Case]], Awaitable[Sequence[A | Answer]]],
    ) -> Sequence[A | Answer]:
        """What a service answers, timed. Each case carries the context in which the service tells of it."""
        batch = self._current.get()
        if batch is None:
            return await ask(cases)
        stage = _Stage(name, self._recorder.new_id(), cases, self._clock.monotonic())
        batch.stages.append(stage)
        span = f"{stage.span:016x}"
        for case in cases:
            kept = case.claim.id in batch.kept
            # Only bureau can find out by itself that something is wrong; the others are told of whom to tell.
            case.traceparent = (
                f"{case.claim.traceparent[:36]}{span}-{'01' if kept else '00'}"
                if case.claim.traceparent and (kept or name == "gather")
                else ""
            )
        answers: Sequence[A | Answer] = ()
        try:
            answers = await ask(cases)
            return answers
        except BaseException as error:
            stage.error = type(error).__name__
            raise
        finally:
            stage.ended = self._clock.monotonic()
            for case, answer in zip(cases, answers, strict=False):
                if isinstance(answer, Answer):
                    stage.gaps[case.claim.id] = answer

    async def settled(self, settle: Callable[[], Awaitable[T]]) -> T:
        """A commit, timed."""
        batch = self._current.get()
        if batch is None:
            return await settle()
        stage = _Stage("settle", self._recorder.new_id(), (), self._clock.monotonic())
        batch.stages.append(stage)
        try:
            return await settle()
        except BaseException as error:
            stage.error = type(error).__name__
            raise
        finally:
            stage.ended = self._clock.monotonic()

    def stored(self, batch: Sequence[New], began: float) -> None:
        """New applications are on disk, after a commit that began then (monotonic): told where it took long."""
        ended = self._clock.monotonic()
        if ended - began < SLOW_COMMIT_S:
            return
        try:
            self._tell_stored(batch, began, ended)
        except Exception as failed:  # noqa: BLE001  As for a batch: it is stored, and its callers are to be told so.
            self._report("not_traced", error_type=type(failed).__name__, exc_info=failed)

    def _tell_stored(self, batch: Sequence[New], began: float, ended: float) -> None:
        recorder, span = self._recorder, self._recorder.new_id()
        for new in batch:
            if at := place_of(new.traceparent):
                recorder.keep(at)
                recorder.tell(
                    STORE, Place(at.trace_id, span), at.span_id, recorder.at(began), recorder.at(ended), kind="client",
                    attributes={
                        semconv.APPLICATION_ID: new.id, semconv.DB_OPERATION: "accept", semconv.KEPT_FOR: "slow",
                        semconv.MESSAGING_BATCH_COUNT: len(batch),
                    },
                )  # fmt: skip

    def put_aside(self, parked: Sequence[Parked]) -> None:
        """The store parked these when it claimed them: no batch ever sees what cannot be read."""
        results = {one.claim.id: one for one in parked}
        self._told([one.claim for one in parked], self._begin({}), results, None, self._clock.monotonic())

    # --- The batch ---

    async def decide(
        self, claims: Sequence[Claim], decide: Callable[[Sequence[Claim]], Awaitable[Mapping[str, Result]]]
    ) -> Mapping[str, Result]:
        """What `decide` answers or raises. Afterwards, whatever was worth it is told."""
        batch = self._begin({claim.id: why for claim in claims if (why := _known(claim))})
        before = self._current.set(batch)
        began = self._clock.monotonic()
        results: Mapping[str, Result] = {}
        error: BaseException | None = None
        try:
            with apart(batch.at):
                results = await decide(claims)
            return results
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._current.reset(before)
            self._told(claims, batch, results, error, began)

    def _begin(self, kept: Mapping[str, str]) -> _Batch:
        new_id = self._recorder.new_id
        return _Batch(Place((new_id() << 64) | new_id(), new_id()), new_id(), kept)

    def _told(
        self,
        claims: Sequence[Claim],
        batch: _Batch,
        results: Mapping[str, Result],
        error: BaseException | None,
        began: float,
    ) -> None:
        try:
            self._tell(batch, claims, results, error, began)
        except Exception as failed:  # noqa: BLE001  What cannot be told must not cost a decision.
            self._report("not_traced", error_type=type(failed).__name__, exc_info=failed)

    def _tell(
        self,
        batch: _Batch,
        claims: Sequence[Claim],
        results: Mapping[str, Result],
        error: BaseException | None,
        began: float,
    ) -> None:
        ended = self._clock.monotonic()
        batch.epoch_s = self._recorder.at(0.0)
        told = []
        for claim in claims:
            why = self._worth(batch, claim, results.get(claim.id), error, batch.epoch_s + ended)
            at = place_of(claim.traceparent) if why else None
            # Of what an earlier attempt or a slow commit was told, the end is told too.
            if at and why == "late" and not self._recorder.has_told(at) and not self._is_among_the_first(ended):
                continue
            if at:
                self._tell_one(batch, claim, at, results.get(claim.id), error, began, ended, why)
                told.append(at)
        if told:
            self._recorder.tell(
                ATTEMPT, batch.at, 0, batch.epoch_s + began, batch.epoch_s + ended, kind="consumer",
                attributes={**_queue(len(claims)), semconv.OWNER: self._owner},
                error=type(error).__name__ if error else "",
                links=[Place(at.trace_id, batch.attempt) for at in told],
            )  # fmt: skip

    def _worth(
        self, batch: _Batch, claim: Claim, result: Result | None, error: BaseException | None, now_s: float
    ) -> str:
        """Why an application's trace is kept; '' where all was well and it was not sampled either."""
        if error is not None:
            return "failed"
        match result:
            case None:
                return "lost_lease"
            case Deferred():
                return "deferred"
            case Parked():
                return "parked"
            case Decided():
                if result.details.get("degradations"):
                    return "degraded"
        late_s = self._slow_s * PATIENCE.get(claim.priority, 1.0)
        return batch.kept.get(claim.id) or ("late" if now_s - claim.created_at >= late_s else "")

    def _is_among_the_first(self, now: float) -> bool:
        """Whether there is room for one more of those that are only late."""
        earned = (now - self._crowd_at) * CROWD_A_SECOND
        self._crowd_room, self._crowd_at = min(CROWD_A_SECOND, self._crowd_room + earned), now
        if self._crowd_room < 1:
            return False
        self._crowd_room -= 1
        return True

    def _tell_one(
        self,
        batch: _Batch,
        claim: Claim,
        at: Place,
        result: Result | None,
        error: BaseException | None,
        began: float,
        ended: float,
        why: str,
    ) -> None:
        recorder = self._recorder
        began_at, ended_at = batch.epoch_s + began, batch.epoch_s + ended
        first = claim.waiting_for == "[]"
        if first:
            self._tell_call(claim, at, why)
        if claim.lost_lease:
            self._tell_lost(claim, at)
        waits_from = max(claim.created_at, min(claim.not_before, began_at))
        if began_at - waits_from >= WAIT_SHOWN_S:
            place = Place(at.trace_id, recorder.new_id())
            recorder.tell(WAIT, place, at.span_id, waits_from, began_at, attributes=_of(claim))
        outcome, wrong, said = _outcome(result, error)
        attributes = {
            **_queue(1), **_of(claim), **said, semconv.LENDER: claim.lender, semconv.OWNER: self._owner,
            semconv.OUTCOME: outcome, semconv.KEPT_FOR: why, semconv.ATTEMPT: claim.fence,
            semconv.MESSAGING_BATCH_COUNT: max(1, len(batch.stages[0].cases)) if batch.stages else 1,
            semconv.WAITED_MS: round(1000 * (began_at - waits_from), 1),
            semconv.AGE_MS: round(1000 * (ended_at - claim.created_at), 1),
        }  # fmt: skip
        if wrong:
            attributes[semconv.ERROR_TYPE] = wrong
        recorder.tell(
            ATTEMPT, Place(at.trace_id, batch.attempt), at.span_id, began_at, ended_at, kind="consumer",
            attributes=attributes, error=wrong, links=[batch.at],
        )  # fmt: skip
        for stage in batch.stages:
            self._tell_stage(batch, stage, claim, at)

    def _tell_stage(self, batch: _Batch, stage: _Stage, claim: Claim, at: Place) -> None:
        recorder, hop = self._recorder, stage.name in METHODS
        if hop and not stage.asked_for(claim.id):
            return
        gap = stage.gaps.get(claim.id)
        attributes: dict[str, str | int | float | bool] = {**_of(claim)}
        wrong = stage.error
        if hop:
            attributes |= {semconv.RPC_SYSTEM_NAME: "grpc", semconv.RPC_METHOD: METHODS[stage.name],
                           semconv.MESSAGING_BATCH_COUNT: len(stage.cases)}  # fmt: skip
        else:
            attributes[semconv.DB_OPERATION] = "settle"
        if isinstance(gap, Unavailable):
            wrong = wrong or gap.status or gap.cause
            attributes[semconv.DEPENDENCY] = gap.cause.split("_")[0]
            if gap.status:
                attributes[semconv.RPC_STATUS_CODE] = gap.status
            if gap.detail:
                attributes[semconv.CAUSE] = short(gap.detail)
        elif isinstance(gap, Unfit):
            attributes[semconv.REASON] = gap.reason
        elif isinstance(gap, Broken):
            wrong = wrong or gap.cause
            attributes[semconv.EXCEPTION_TYPE] = gap.error_type
        elif hop and not wrong:
            attributes[semconv.RPC_STATUS_CODE] = "OK"
        if wrong:
            attributes[semconv.ERROR_TYPE] = wrong
        recorder.tell(
            METHODS.get(stage.name, COMMIT), Place(at.trace_id, stage.span), batch.attempt,
            batch.epoch_s + stage.began, batch.epoch_s + stage.ended, kind="client", attributes=attributes, error=wrong,
        )  # fmt: skip

    def _tell_call(self, claim: Claim, at: Place, why: str) -> None:
        """The call that brought it: ours to tell, or of a replica that may be gone."""
        if is_kept(claim.traceparent) or self._recorder.keep(at):
            return
        self._recorder.tell(
            "lending.intake.v1.IntakeService/SubmitApplication", at, 0, claim.created_at, claim.created_at,
            kind="server", attributes={**_of(claim), semconv.RECONSTRUCTED: True, semconv.KEPT_FOR: why},
        )  # fmt: skip

    def _tell_lost(self, claim: Claim, at: Place) -> None:
        """An attempt that ended with its replica: nobody else can tell of it."""
        owner, _, end = claim.lost_lease.rpartition("@")
        ended_at = float(end)
        self._recorder.tell(
            LOST, Place(at.trace_id, self._recorder.new_id()), at.span_id,
            max(claim.created_at, ended_at - self._lease_s), ended_at, kind="consumer",
            attributes={**_queue(1), **_of(claim), semconv.OWNER: owner, semconv.LEASE_END: ended_at,
                        semconv.ERROR_TYPE: "lease_ended", semconv.OUTCOME: "lost", semconv.RECONSTRUCTED: True},
            error="lease_ended",
        )  # fmt: skip


def _known(claim: Claim) -> str:
    if claim.lost_lease:
        return "lost_lease"
    if claim.waiting_for != "[]":
        return "retried"
    return "sampled" if is_kept(claim.traceparent) else ""


def _of(claim: Claim) -> dict[str, str | int | float | bool]:
    return {semconv.APPLICATION_ID: claim.id}


def _queue(count: int) -> dict[str, str | int | float | bool]:
    return {
        semconv.MESSAGING_SYSTEM: "loanmesh", semconv.MESSAGING_OPERATION: "process",
        semconv.MESSAGING_DESTINATION: "applications", semconv.MESSAGING_BATCH_COUNT: count,
    }  # fmt: skip


def _outcome(
    result: Result | None, error: BaseException | None
) -> tuple[str, str, dict[str, str | int | float | bool]]:
    """An attempt's outcome, what is wrong with it, and what else is to be said of it."""
    if error is not None:
        return "failed", type(error).__name__, {semconv.CAUSE: short(str(error)) if _ours(error) else ""}
    match result:
        case None:
            return "lost", "fence_lost", {}
        case Deferred():
            return "deferred", result.waiting_for[0], {semconv.WAITING_FOR: ",".join(result.waiting_for)}
        case Parked():
            said = {semconv.CAUSE: result.broken.cause, semconv.EXCEPTION_TYPE: result.broken.error_type}
            return "parked", f"{result.stage}_broke", {**said, semconv.STAGE: result.stage}
        case Decided():
            degradations = result.details.get("degradations", "")
            return result.outcome, "", {semconv.DEGRADATIONS: degradations} if degradations else {}
        case _:
            return "awaiting_information", "", {}


def _ours(error: BaseException) -> bool:
    from loanmesh.runtime.errors import NotNow

    return isinstance(error, NotNow)


@dataclass(frozen=True)
class _Bureau:
    following: Following
    inner: Bureau

    async def gather(self, cases: Sequence[Case]) -> Sequence[CreditProfile | Answer]:
        return await self.following.asked("gather", cases, self.inner.gather)


@dataclass(frozen=True)
class _Scoring:
    following: Following
    inner: Scoring

    async def score(self, cases: Sequence[Case]) -> Sequence[Score | Answer]:
        return await self.following.asked("score", cases, self.inner.score)


@dataclass(frozen=True)
class _Pricing:
    following: Following
    inner: Pricer

    async def price(self, cases: Sequence[Case]) -> Sequence[Pricing | Answer]:
        return await self.following.asked("price", cases, self.inner.price)


@dataclass(frozen=True)
class _Store:
    following: Following
    inner: Settlement

    async def settle(self, results: Sequence[Result]) -> set[str]:
        return await self.following.settled(lambda: self.inner.settle(results))
