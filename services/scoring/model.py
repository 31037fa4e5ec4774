"""A trained model as it is stored: parameters, card and the hash that names it exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

from services.scoring.scorecard import Tables


@dataclass(frozen=True)
class Model:
    """One model in force."""

    name: str
    party_kind: str
    """`person` or `firm`."""
    intercept: float
    terms: Sequence[Mapping[str, Any]]
    """One entry a feature: `step` (edges, values, missing) or `linear` (transform, low, high, mean, weight ...)."""
    bands: Mapping[str, float]
    """Highest PD of each grade."""
    required_sources: frozenset[str]
    hash: str
    """SHA-256 of the file, hexadecimal."""
    card: str

    @cached_property
    def features(self) -> list[str]:
        """Names of the features, in the order of the terms."""
        return [str(term["feature"]) for term in self.terms]

    @cached_property
    def columns(self) -> dict[str, int]:
        """Where each feature stands among the terms."""
        return {name: column for column, name in enumerate(self.features)}

    @cached_property
    def tables(self) -> Tables:
        """The terms as arrays."""
        return Tables(self.terms)


def load_model(name: str) -> Model:
    """Read a model from artefacts/. Raises FileNotFoundError naming what is there."""
    folder = resources.files("services.scoring") / "artefacts"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))
        raise FileNotFoundError(f"there is no model {name}; known are {known}")
    content = file.read_bytes()
    read = json.loads(content)
    return Model(
        name=read["model"],
        party_kind=read["party_kind"],
        intercept=read["intercept"],
        terms=read["terms"],
        bands=read["bands"],
        required_sources=frozenset(read["required_sources"]),
        hash=hashlib.sha256(content).hexdigest(),
        card=(folder / f"{name}.md").read_text(encoding="utf-8"),
    )
