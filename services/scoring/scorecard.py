"""The score: an intercept and one contribution a feature, added up. Batches in numpy; exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from services.scoring.model import Model

Floats = NDArray[np.float64]


class Tables:
    """A model's terms as arrays, by kind: a batch costs a few calls a kind instead of a dozen a term."""

    def __init__(self, terms: Sequence[Mapping[str, Any]]) -> None:
        self.if_unknown = np.array([term.get("missing", 0.0) for term in terms])
        """Shape (features,). An unknown fact in a linear term counts as the average one: neither for nor against."""
        steps = [column for column, term in enumerate(terms) if term["kind"] == "step"]
        self.steps = np.array(steps, dtype=np.intp)
        self.edges = [np.array(terms[column]["edges"], dtype=np.float64) for column in steps]
        widest = max((len(terms[column]["values"]) for column in steps), default=0)
        self.values = np.array([_padded(terms[column]["values"], widest) for column in steps], dtype=np.float64)
        """Shape (steps, widest)."""
        linear = [column for column, term in enumerate(terms) if term["kind"] == "linear"]
        self.linear = np.array(linear, dtype=np.intp)
        self.low, self.high, self.weight, self.mean, self.deviation = (
            np.array([terms[column][name] for column in linear])
            for name in ("low", "high", "weight", "mean", "deviation")
        )
        self.logged = np.array([terms[column]["transform"] == "log1p" for column in linear], dtype=np.bool_)


def contributions(model: Model, features: Floats) -> Floats:
    """Each feature's share in the log-odds of default, shape (n, features).

    features  shape (n, features), in the model's order; NaN where a fact is unknown.
    """
    tables = model.tables
    parts = np.empty_like(features)
    if tables.steps.size:
        parts[:, tables.steps] = _steps(tables, features)
    if tables.linear.size:
        parts[:, tables.linear] = _linear(tables, features[:, tables.linear])
    known: Floats = np.where(np.isnan(features), tables.if_unknown, parts)
    return known


def log_odds(model: Model, parts: Floats) -> Floats:
    """Log-odds of default, shape (n,): the intercept and all contributions."""
    total: Floats = model.intercept + parts.sum(axis=1)
    return total


def _steps(tables: Tables, features: Floats) -> Floats:
    bins = np.empty((len(features), len(tables.steps)), dtype=np.intp)
    for number, (column, edges) in enumerate(zip(tables.steps, tables.edges, strict=True)):
        # A value on an edge belongs to the bin below it, as in the trees (x <= threshold goes left).
        bins[:, number] = edges.searchsorted(features[:, column], side="left")
    values: Floats = tables.values[np.arange(len(tables.steps)), bins]
    return values


def _linear(tables: Tables, values: Floats) -> Floats:
    clipped = np.minimum(np.maximum(values, tables.low), tables.high)
    shaped = np.where(tables.logged, np.log1p(np.maximum(clipped, 0.0)), clipped)
    weighed: Floats = tables.weight * (shaped - tables.mean) / tables.deviation
    return weighed


def _padded(values: Sequence[float], length: int) -> list[float]:
    """With the last value repeated: it holds beyond the last edge, and for NaN, which sorts last."""
    return [*values, *[values[-1]] * (length - len(values))]
