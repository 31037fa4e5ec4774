"""A replay: the same comes out, or what differs is named; another version is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from lending.bureau.v1.bureau_service_pb2 import CreditProfile
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown, WrongState
from services.intake.application import Snapshot, State
from services.intake.pipeline import decision_from
from services.intake.ports import Case, Unavailable, Unfit
from services.intake.replay import Replay
from services.pricing.decide import price
from services.pricing.policy import load_policy
from tests.builders import a_profile, an_application

POLICY = load_policy("cn-demo-2026-11")


class Fakes:
    """Scoring that answers what it is told; pricing by the real policy."""

    def __init__(self, score: Score | Unavailable) -> None:
        self.scored = score

    async def score(self, cases: Sequence[Case]) -> Sequence[Score | Unavailable | Unfit]:
        return [self.scored for _ in cases]

    async def price(self, cases: Sequence[Case]) -> Sequence[Pricing | Unavailable | Unfit]:
        return [priced(case.profile, case.score, case) for case in cases]


def a_score(pd: float = 0.02, model_hash: str = "m1") -> Score:
    return Score(pd=pd, grade="A", model="consumer", model_hash=model_hash)


def priced(profile: CreditProfile | None, score: Score | None, case: Case | None = None) -> Pricing:
    application = an_application("person", 8)
    item = PriceApplicationsRequest.Item(
        party_kind=Party.KIND_PERSON, loan=application.loan, declaration=application.declaration, profile=profile,
        score=score, age_years=30,
    )  # fmt: skip
    return price(item, POLICY, case.as_of if case and case.as_of else FakeClock().now())


def stored(score: Score) -> tuple[Snapshot, tuple[bytes, bytes, bytes, bytes]]:
    profile = a_profile("person", 8)
    pricing = priced(profile, score)
    decision = decision_from(1, score, pricing)
    decision.decide_time.FromDatetime(FakeClock().now())
    now_s = FakeClock().now().timestamp()
    payload = an_application("person", 8).SerializeToString()
    snapshot = Snapshot("id", "lenders/demo", payload, State.DECIDED, 0.0, (), (), None, 1, "", 2, now_s, now_s, b"")
    parts = (decision, profile, score, pricing)
    return snapshot, tuple(part.SerializeToString() for part in parts)  # type: ignore[return-value]  # Four of them.


async def test_the_same_evidence_and_versions_give_the_same_decision() -> None:
    fakes = Fakes(a_score())
    answer = await Replay(fakes, fakes)(*stored(a_score()))
    assert answer.same
    assert list(answer.differences) == []
    assert answer.stored == answer.replayed
    assert answer.stored.offers


async def test_what_differs_is_named() -> None:
    fakes = Fakes(a_score(pd=0.05))
    answer = await Replay(fakes, fakes)(*stored(a_score()))
    assert not answer.same
    assert {"offers", "pd"} <= set(answer.differences)


async def test_another_version_is_refused_by_name() -> None:
    fakes = Fakes(a_score(model_hash="m2"))
    with pytest.raises(WrongState, match="model consumer"):
        await Replay(fakes, fakes)(*stored(a_score()))


async def test_a_service_that_is_away_is_no_difference() -> None:
    fakes = Fakes(Unavailable("scoring_unavailable"))
    with pytest.raises(DependencyDown):
        await Replay(fakes, fakes)(*stored(a_score()))
