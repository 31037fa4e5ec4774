"""Log-odds as PD, points and grade."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scoring.calibration import grade, points, probability
from services.scoring.model import Model, load_model

MODELS = [load_model("consumer-2026-11"), load_model("firm-2026-11")]


@pytest.mark.parametrize(("odds", "expected"), [(30, 600), (60, 620), (15, 580), (240, 660)])
def test_points_are_600_at_30_to_1_and_double_every_20(odds: int, expected: int) -> None:
    assert points(1 / (1 + odds)) == expected


@given(log_odds=st.floats(allow_nan=False, allow_infinity=True))
def test_a_pd_is_always_inside_zero_and_one(log_odds: float) -> None:
    assert 0 < probability(log_odds) < 1


@given(low=st.floats(-12, 12), step=st.floats(0, 5))
def test_riskier_is_never_more_points(low: float, step: float) -> None:
    assert points(probability(low + step)) <= points(probability(low))


def test_log_odds_of_zero_are_a_pd_of_one_half() -> None:
    assert probability(0.0) == 0.5
    assert probability(math.log(0.2 / 0.8)) == pytest.approx(0.2)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_a_band_ends_where_the_next_begins(model: Model) -> None:
    assert sorted(model.bands, key=model.bands.__getitem__) == ["A", "B", "C", "D", "E"]
    for name, following in zip("ABCD", "BCDE", strict=True):
        limit = model.bands[name]
        assert grade(math.nextafter(limit, 0), model.bands) == name
        assert grade(limit, model.bands) == following
    assert grade(probability(math.inf), model.bands) == "E"


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_the_card_states_the_bands_in_force(model: Model) -> None:
    stated = ", ".join(f"{name} below {limit:.0%}" for name, limit in model.bands.items() if name != "E")
    assert f"{stated}, E above" in model.card
