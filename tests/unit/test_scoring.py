"""Scoring: exact reasons, sane direction, no score without its source."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import integers, sampled_from
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.scoring.v1.scoring_service_pb2 import ScoreProfilesRequest
from lending.type.v1.party_pb2 import Party

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.status import error_info
from services.scoring.calibration import grade, points
from services.scoring.model import load_model
from services.scoring.scorecard import contributions, log_odds
from services.scoring.servicer import ScoringServicer
from tests.builders import a_profile

MODELS = {Party.KIND_PERSON: load_model("consumer-2026-11"), Party.KIND_FIRM: load_model("firm-2026-11")}


async def scored(kind: str, index: int, **more: object):  # type: ignore[no-untyped-def]
    servicer = ScoringServicer(MODELS, FakeClock())
    party = Party.KIND_PERSON if kind == "person" else Party.KIND_FIRM
    profile = a_profile(kind, index, **more)  # type: ignore[arg-type]
    item = ScoreProfilesRequest.Item(key="k", party_kind=party, profile=profile)
    return (await servicer.ScoreProfiles(ScoreProfilesRequest(items=[item]), None)).results[0]  # type: ignore[arg-type]


@given(sampled_from(["person", "firm"]), integers(0, 5000))
async def test_the_reasons_add_up_to_the_score_exactly(kind: str, index: int) -> None:
    score = (await scored(kind, index)).score
    total = score.intercept + sum(factor.contribution for factor in score.factors)
    assert 1 / (1 + math.exp(-total)) == pytest.approx(score.pd, abs=1e-12)


async def test_a_batch_scores_as_its_items_do_alone() -> None:
    servicer = ScoringServicer(MODELS, FakeClock())
    items = [
        ScoreProfilesRequest.Item(key=str(i), party_kind=Party.KIND_PERSON, profile=a_profile("person", i))
        for i in range(64)
    ]
    together = await servicer.ScoreProfiles(ScoreProfilesRequest(items=items), None)  # type: ignore[arg-type]
    for i, result in enumerate(together.results):
        assert result.score.pd == (await scored("person", i)).score.pd


@pytest.mark.parametrize(
    "name", ["credit.revolving_utilisation", "credit.overdue_30_59_count", "credit.overdue_90_count"]
)
def test_more_trouble_is_never_less_risk(name: str) -> None:
    model = MODELS[Party.KIND_PERSON]
    column = model.features.index(name)
    rows = np.full((200, len(model.terms)), math.nan)
    rows[:, column] = np.linspace(0, 5, 200)
    risk = log_odds(model, contributions(model, rows))
    assert (np.diff(risk) >= -1e-12).all()


async def test_without_its_source_there_is_no_score_but_a_name() -> None:
    result = await scored("firm", 1, states={"tax": SourceReport.STATE_MISSING})
    info = error_info(result.error)
    assert info is not None
    assert (info.reason, info.metadata["sources"]) == ("MISSING_EVIDENCE", "tax")


async def test_a_thin_file_is_scored_on_what_is_unknown() -> None:
    result = await scored("person", 1, states={"central_bank": SourceReport.STATE_NOT_FOUND})
    assert result.WhichOneof("outcome") == "score"


def test_points_and_grades_follow_their_definitions() -> None:
    assert points(1 / 31) == 600
    assert points(1 / 61) == 620
    bands = {"A": 0.03, "B": 0.06, "E": 1.0}
    assert [grade(pd, bands) for pd in (0.0299, 0.03, 0.06, 0.99)] == ["A", "B", "E", "E"]
