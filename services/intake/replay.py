"""A decision made once more, from what was stored with it: the proof that it can be explained by nothing else."""

from __future__ import annotations

import datetime as dt

from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.intake.v1.intake_service_pb2 import Decision, ReplayDecisionResponse
from lending.pricing.v1.pricing_service_pb2 import Pricing
from lending.scoring.v1.scoring_service_pb2 import Score

from loanmesh.runtime.errors import DependencyDown, WrongState
from services.intake.application import Claim, Snapshot, differing
from services.intake.pipeline import OUTCOMES, decision_from, open_case
from services.intake.ports import Pricer, Scoring


class Replay:
    """Scores and prices stored evidence again."""

    def __init__(self, scoring: Scoring, pricing: Pricer) -> None:
        self._scoring = scoring
        self._pricing = pricing

    async def __call__(self, snapshot: Snapshot, stored: tuple[bytes, bytes, bytes, bytes]) -> ReplayDecisionResponse:
        """Compare.

        stored  decision, profile, score and pricing as they were kept.
        Raises WrongState when another model or policy is in force, DependencyDown when a service does not answer.
        """
        before, score_before, pricing_before = (
            Decision.FromString(stored[0]), Score.FromString(stored[2]), Pricing.FromString(stored[3])
        )  # fmt: skip
        claim = Claim(
            snapshot.id, snapshot.lender, 0, before.assessment, 0, 0, "", snapshot.payload, "[]", snapshot.created_at
        )
        case = open_case(claim)
        case.profile = CreditProfile.FromString(stored[1])
        case.as_of = pricing_before.price_time.ToDatetime(dt.UTC)
        (score,) = await self._scoring.score([case])
        if not isinstance(score, Score):
            raise DependencyDown("scoring does not answer for the stored evidence; ask again")
        _require_version("model", score_before.model, score_before.model_hash, score.model, score.model_hash)
        case.score = score
        (pricing,) = await self._pricing.price([case])
        if not isinstance(pricing, Pricing):
            raise DependencyDown("pricing does not answer for the stored evidence; ask again")
        _require_version(
            "policy", pricing_before.policy, pricing_before.policy_hash, pricing.policy, pricing.policy_hash
        )
        response = ReplayDecisionResponse(stored=before, model_hash=score.model_hash, policy_hash=pricing.policy_hash)
        if pricing.outcome in OUTCOMES:
            response.replayed.CopyFrom(decision_from(before.assessment, score, pricing))
            response.replayed.decide_time.CopyFrom(before.decide_time)
        response.differences.extend(differing(before, response.replayed))
        response.same = not response.differences
        return response


def _require_version(what: str, name: str, hash_: str, name_now: str, hash_now: str) -> None:
    if hash_ != hash_now:
        raise WrongState(
            f"decided under {what} {name} ({hash_[:12]}), but {name_now} ({hash_now[:12]}) is in force here;"
            " replay it where the former is",
            state="DECIDED",
        )
