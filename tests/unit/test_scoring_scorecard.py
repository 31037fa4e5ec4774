"""The score's arithmetic: exact, equal to the trees it came from, and defensible in its direction."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.reason_pb2 import Fact, Reason

from services.scoring.model import Model, ModelError, load_model
from services.scoring.reasons import COUNTS_FROM, add_reasons
from services.scoring.scorecard import contributions, log_odds

CONSUMER = load_model("consumer-2026-11")
FIRM = load_model("firm-2026-11")
REFERENCE = json.loads(Path(__file__).with_name("data").joinpath("scoring_consumer_reference.json").read_text())
NEVER_SAFER = (
    "credit.revolving_utilisation",
    "credit.overdue_30_59_count",
    "credit.overdue_60_89_count",
    "credit.overdue_90_count",
)
some_value = st.one_of(
    st.just(math.nan), st.floats(min_value=-1e12, max_value=1e12), st.sampled_from([math.inf, -math.inf])
)


def reasons(parts: Sequence[float], names: Sequence[str]) -> Sequence[Reason]:
    def state(column: int, fact: Fact) -> None:
        fact.attribute = f"feature {column}"

    score = Score()
    add_reasons(score, parts, names, state)
    return score.factors


@pytest.mark.parametrize("model", [CONSUMER, FIRM], ids=lambda m: m.name)
@given(data=st.data())
def test_intercept_and_reasons_add_up_to_the_log_odds(model: Model, data: st.DataObject) -> None:
    row = data.draw(st.lists(some_value, min_size=len(model.terms), max_size=len(model.terms)))
    parts = contributions(model, np.array([row]))
    total = float(log_odds(model, parts)[0])
    said = reasons(parts[0].tolist(), model.features)
    assert math.isfinite(total)
    assert model.intercept + sum(r.contribution for r in said) == pytest.approx(total, abs=1e-12)


def test_the_tables_say_what_the_trees_say() -> None:
    # Made-up vectors, a fifth of them exactly on an edge; the raw scores are LightGBM's own.
    assert REFERENCE["features"] == CONSUMER.features
    rows = np.array([[math.nan if v is None else v for v in row["values"]] for row in REFERENCE["rows"]])
    trees = np.array([row["raw_score"] for row in REFERENCE["rows"]])
    assert len(rows) == 50
    np.testing.assert_allclose(log_odds(CONSUMER, contributions(CONSUMER, rows)), trees, atol=1e-9, rtol=0)


@pytest.mark.parametrize("feature", NEVER_SAFER)
def test_more_debt_in_use_or_more_arrears_never_lower_the_risk(feature: str) -> None:
    (values,) = (term["values"] for term in CONSUMER.terms if term["feature"] == feature)
    assert values == sorted(values)


def test_a_batch_gives_each_row_what_it_gets_alone() -> None:
    rows = np.array([[math.nan if v is None else v for v in row["values"]] for row in REFERENCE["rows"]])
    together = contributions(CONSUMER, rows)
    alone = np.vstack([contributions(CONSUMER, row[None, :]) for row in rows])
    np.testing.assert_array_equal(together, alone)


def test_small_contributions_are_added_up_and_the_largest_comes_first() -> None:
    small = COUNTS_FROM / 2
    names = [f"credit.{word}" for word in ("one", "two", "three", "four")]
    said = reasons([small, -0.5, 1.0, small], names)
    assert [(r.code, r.effect, [fact.attribute for fact in r.facts]) for r in said] == [
        ("SCORE_THREE", Reason.EFFECT_ADVERSE, ["feature 2"]),
        ("SCORE_TWO", Reason.EFFECT_FAVOURABLE, ["feature 1"]),
        ("SCORE_OTHER", Reason.EFFECT_ADVERSE, []),
    ]
    assert said[-1].contribution == pytest.approx(2 * small)


def test_an_unknown_fact_of_a_firm_counts_neither_way() -> None:
    parts = contributions(FIRM, np.full((1, len(FIRM.terms)), math.nan))
    assert not parts.any()


def test_an_unknown_overdue_count_is_no_proof_of_a_spotless_record() -> None:
    unknown = contributions(CONSUMER, np.full((1, len(CONSUMER.terms)), math.nan))[0]
    none_overdue = contributions(CONSUMER, np.zeros((1, len(CONSUMER.terms))))[0]
    for feature in NEVER_SAFER:
        column = CONSUMER.features.index(feature)
        assert unknown[column] > none_overdue[column]


def test_a_model_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ModelError, match=r"no model consumer-1999; known are consumer-2026-11, firm-2026-11"):
        load_model("consumer-1999")
