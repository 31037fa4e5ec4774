"""The score: an intercept and one contribution a feature, added up. Batches in numpy; exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.scoring.model import Model

Floats = NDArray[np.float64]


def contributions(model: Model, features: Floats) -> Floats:
    """Each feature's share in the log-odds of default, shape (n, features).

    features  shape (n, features), in the model's order; NaN where a fact is unknown.
    """
    parts = [_contribution(term, features[:, column]) for column, term in enumerate(model.terms)]
    return np.column_stack(parts)


def log_odds(model: Model, parts: Floats) -> Floats:
    """Log-odds of default, shape (n,): the intercept and all contributions."""
    total: Floats = model.intercept + parts.sum(axis=1)
    return total


def _contribution(term: Mapping[str, Any], values: Floats) -> Floats:
    unknown = np.isnan(values)
    if term["kind"] == "step":
        # A value on an edge belongs to the bin below it, as in the trees (x <= threshold goes left).
        bins = np.searchsorted(term["edges"], values, side="left").clip(0, len(term["values"]) - 1)
        step: Floats = np.where(unknown, term["missing"], np.asarray(term["values"], dtype=np.float64)[bins])
        return step
    clipped = np.clip(values, term["low"], term["high"])
    shaped = np.log1p(np.maximum(clipped, 0.0)) if term["transform"] == "log1p" else clipped
    # An unknown fact counts as the average one: neither for nor against.
    linear: Floats = np.where(unknown, 0.0, term["weight"] * (shaped - term["mean"]) / term["deviation"])
    return linear
