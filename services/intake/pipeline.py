"""How an application is decided: gather, score, price, commit, in batches. Knows Protocols only."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from lending.bureau.v1.bureau_service_pb2 import CreditProfile, SourceReport
from lending.intake.v1.intake_service_pb2 import Application, Decision
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.consent import has_consent
from loanmesh.runtime.errors import NotNow
from loanmesh.runtime.identity import age_on
from services.intake.application import Claim, borrower
from services.intake.parking import Blame, Parking
from services.intake.ports import (
    Answer,
    Awaiting,
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

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 20.0
_COMPLETE = frozenset({SourceReport.STATE_FRESH, SourceReport.STATE_NOT_FOUND})
_TOO_BUSY = frozenset({"overloaded", "bulkhead_full"})
"""Words of the bureau for a source that was asked too much; it is well otherwise."""
_APPLICANTS = ("consents", "declaration", "loan.product")
"""Fields that an applicant can supply. A stage that finds fault with another one is itself at fault, or we are."""
OUTCOMES = {
    Pricing.OUTCOME_APPROVED: Decision.OUTCOME_APPROVED,
    Pricing.OUTCOME_COUNTER_OFFER: Decision.OUTCOME_COUNTER_OFFER,
    Pricing.OUTCOME_DECLINED: Decision.OUTCOME_DECLINED,
}
T = TypeVar("T", CreditProfile, Score, Pricing)


@dataclass
class _Way:
    """How far a batch has come."""

    stage: str = "open"


class Pipeline:
    """Decides claimed applications, whichever way they were claimed.

    sources  those that a profile must have a report of, or no decline rests on it.
    """

    def __init__(
        self,
        bureau: Bureau,
        scoring: Scoring,
        pricing: Pricer,
        store: Settlement,
        clock: Clock,
        dice: random.Random,
        information_days: float,
        parking: Parking,
        report: Callable[..., None],
        sources: Sequence[str],
    ) -> None:
        self._bureau = bureau
        self._scoring = scoring
        self._pricing = pricing
        self._store = store
        self._clock = clock
        self._dice = dice
        self._information_days = information_days
        self._parking = parking
        self._report = report
        self._sources = sources

    async def decide_batch(self, claims: Sequence[Claim]) -> dict[str, Result]:
        """Take a batch as far as evidence allows and commit it; what was committed, by application id.

        Each application goes its own way: one that a stage cannot answer for drops out as deferred or awaiting
        information, and none is ever declined for it. Raises DependencyDown when the store cannot commit; the leases
        then end by themselves and the work is done again.
        """
        way = _Way()
        try:
            return await self._decide(claims, way)
        except NotNow:
            raise
        except Exception as error:  # noqa: BLE001  A bug of ours, or what one application makes of sound code.
            self._report("stage_broke", stage=way.stage, count=len(claims), error_type=type(error).__name__,
                         exc_info=error)  # fmt: skip
            if len(claims) == 1:
                broken = Broken(f"{way.stage}_failed", type(error).__name__)
                return await self._settle([self._set_apart(claims[0], way.stage, broken)])
        # One that cannot be decided must not hold up those beside it: halves find it in a few turns.
        halves = (claims[: len(claims) // 2], claims[len(claims) // 2 :])
        return {key: result for half in halves for key, result in (await self.decide_batch(half)).items()}

    async def _decide(self, claims: Sequence[Claim], way: _Way) -> dict[str, Result]:
        results: list[Result] = []
        cases = [open_case(claim) for claim in claims]
        way.stage = "gather"
        cases = await self._stage(way, cases, self._bureau.gather, _set_profile, results)
        way.stage = "score"
        cases = await self._stage(way, cases, self._scoring.score, _set_score, results)
        way.stage = "price"
        now = self._clock.now()
        for case in cases:
            # By our clock, not pricing's: what an offer's end is compared with is our clock, too.
            case.as_of = now
        cases = await self._stage(way, cases, self._pricing.price, _set_pricing, results)
        way.stage = "conclude"
        results.extend(self._conclude(case) for case in cases)
        way.stage = "commit"
        return await self._settle(results)

    async def _settle(self, results: Sequence[Result]) -> dict[str, Result]:
        committed = await self._store.settle(results)
        self._parking.passed(r.claim.id for r in results if isinstance(r, Decided | Awaiting))
        for result in results:
            if isinstance(result, Parked) and result.claim.id in committed:
                self._report("application_parked", application_id=result.claim.id, stage=result.stage,
                             cause=result.broken.cause, error_type=result.broken.error_type,
                             faults=result.claim.faults + 1, trace_id=result.claim.trace_id)  # fmt: skip
        return {result.claim.id: result for result in results if result.claim.id in committed}

    async def _stage(
        self,
        way: _Way,
        cases: list[Case],
        ask: Callable[[Sequence[Case]], Awaitable[Sequence[T | Answer]]],
        keep: Callable[[Case, T], None],
        results: list[Result],
    ) -> list[Case]:
        """Ask one service about all cases; those it answered for go on, the others become results."""
        going_on = []
        for case, answer in zip(cases, await ask(cases) if cases else (), strict=True):
            if isinstance(answer, Unfit) and not answer.field.startswith(_APPLICANTS):
                answer = Broken(f"{way.stage}_refused", answer.reason)
            if isinstance(answer, Unavailable):
                results.append(self._without(case, answer))
            elif isinstance(answer, Broken):
                results.append(self._set_apart(case.claim, way.stage, answer))
            elif isinstance(answer, Unfit):
                results.append(self._awaiting(case, [{"field": answer.field, "source": "", "reason": answer.reason}]))
            else:
                keep(case, answer)
                going_on.append(case)
        return going_on

    def _set_apart(self, claim: Claim, stage: str, broken: Broken) -> Result:
        """What to do with one that broke a stage: try it again a few times, then park it; never decline."""
        now_s = self._clock.now().timestamp()
        faults = claim.faults + 1
        match self._parking.broke(claim.id, stage, faults):
            case Blame.APPLICATION:
                return Parked(claim, stage, broken, now_s + self._parking.due_s, now_s)
            case Blame.UNKNOWN:
                return Deferred(claim, (broken.cause,), self._parking.wait_s(faults), now_s, broke=True)
            case Blame.STAGE:
                return Deferred(claim, (broken.cause,), self._backoff_s(claim), now_s)

    def _conclude(self, case: Case) -> Result:
        pricing, profile, score = case.pricing, case.gathered, case.scored
        assert pricing is not None
        if pricing.outcome == Pricing.OUTCOME_UNDETERMINED:
            return self._without(case, Unavailable("source_missing", missing_sources=tuple(pricing.missing_sources)))
        # Whatever pricing says, a decline leaves this house on complete evidence that is in date, or not at all.
        if pricing.outcome == Pricing.OUTCOME_DECLINED and (gaps := self._gaps(profile)):
            return self._without(case, Unavailable("source_missing", missing_sources=gaps))
        if pricing.outcome not in OUTCOMES:
            return self._set_apart(case.claim, "price", Broken("pricing_error", "outcome_unknown"))
        return self._decided(case, profile, score, pricing)

    def _gaps(self, profile: CreditProfile) -> tuple[str, ...]:
        now_s = self._clock.now().timestamp()
        reports = {report.source: report for report in profile.reports}
        return tuple(
            source
            for source in dict.fromkeys((*self._sources, *reports))
            if (report := reports.get(source)) is None
            or report.state not in _COMPLETE
            or report.usable_until_time.ToNanoseconds() / 1e9 <= now_s
        )

    def _decided(self, case: Case, profile: CreditProfile, score: Score, pricing: Pricing) -> Decided:
        now = self._clock.now()
        decision = decision_from(case.claim.assessment, score, pricing)
        decision.decide_time.FromDatetime(now)
        outcome = Pricing.Outcome.Name(pricing.outcome).removeprefix("OUTCOME_")
        return Decided(
            claim=case.claim,
            outcome=outcome,
            grade=score.grade,
            decision=decision.SerializeToString(),
            profile=profile.SerializeToString(),
            score=score.SerializeToString(),
            pricing=pricing.SerializeToString(),
            decided_at=now.timestamp(),
            due_at=max((o.expire_time.ToNanoseconds() / 1e9 for o in pricing.offers), default=None),
            details={
                "outcome": outcome,
                "assessment": str(case.claim.assessment),
                "model": score.model,
                "policy": pricing.policy,
                "degradations": ",".join(pricing.degradations),
            },
            product=case.application.loan.product,
        )

    def _without(self, case: Case, gap: Unavailable) -> Result:
        """What to do without an answer: ask the applicant for a consent, or try again; never decline."""
        reports = {report.source: report for report in case.profile.reports} if case.profile else {}
        absent = [reports[source] for source in gap.missing_sources if source in reports]
        unconsented = [r.source for r in absent if r.state == SourceReport.STATE_NO_CONSENT]
        party, consents, now = case.party, case.application.consents, self._clock.now()
        if needed := [source for source in unconsented if not has_consent(consents, party, source, now)]:
            return self._awaiting(
                case, [{"field": "consents", "source": source, "reason": "CONSENT_MISSING"} for source in needed]
            )
        # By our clock it is in force: one of two clocks is wrong, which is no matter of the applicant's.
        waiting_for = tuple(
            f"{'consent_not_in_force' if source in unconsented else 'source_missing'}:{source}"
            for source in gap.missing_sources
        ) or (gap.cause,)
        overloaded = gap.overloaded or (bool(absent) and all(r.missing_cause in _TOO_BUSY for r in absent))
        retry_s = 0.0 if overloaded else self._retry_s(case, gap, absent)
        return Deferred(case.claim, waiting_for, retry_s, self._clock.now().timestamp(), overloaded)

    def _retry_s(self, case: Case, gap: Unavailable, absent: Iterable[SourceReport]) -> float:
        """When to look again: when the last of the missing sources may be back, else after a jittered backoff."""
        now_s = self._clock.now().timestamp()
        hints = [r.retry_time.ToNanoseconds() / 1e9 - now_s for r in absent if r.HasField("retry_time")]
        return self._backoff_s(case.claim, gap.retry_s or 0.0, *hints)

    def _backoff_s(self, claim: Claim, *at_least_s: float) -> float:
        backoff = BACKOFF_FIRST_S * 2.0 ** min(claim.attempts - 1, 10)
        return min(BACKOFF_MAX_S, max([backoff, *at_least_s])) * self._dice.uniform(0.8, 1.2)

    def _awaiting(self, case: Case, missing: list[dict[str, str]]) -> Awaiting:
        now_s = self._clock.now().timestamp()
        return Awaiting(case.claim, tuple(missing), now_s + self._information_days * 86400, now_s)


def open_case(claim: Claim) -> Case:
    """A claimed application, ready for the stages."""
    application = Application.FromString(claim.payload)
    party = borrower(application)
    applied_on = dt.datetime.fromtimestamp(claim.created_at, dt.UTC).date()
    age = age_on(party.identity.value, applied_on) if party.kind == Party.KIND_PERSON else None
    return Case(claim, application, party, age_years=age)


def decision_from(assessment: int, score: Score, pricing: Pricing) -> Decision:
    """What scoring and pricing said, as a decision; not yet made at any time."""
    decision = Decision(
        assessment=assessment,
        outcome=OUTCOMES[pricing.outcome],
        grade=score.grade,
        pd=score.pd,
        degradations=pricing.degradations,
        model=score.model,
        policy=pricing.policy,
    )
    for offer in pricing.offers:
        decision.offers.add().CopyFrom(offer)
    for reason in (*pricing.reasons, *score.factors):
        decision.reasons.add().CopyFrom(reason)
    return decision


def _set_profile(case: Case, profile: CreditProfile) -> None:
    case.profile = profile


def _set_score(case: Case, score: Score) -> None:
    case.score = score


def _set_pricing(case: Case, pricing: Pricing) -> None:
    case.pricing = pricing
