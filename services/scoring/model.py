"""A trained model as it is stored: parameters, card and the hash that names it exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

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


class ModelError(Exception):
    """A model that cannot be used: its file, the place in it, and the rule it breaks."""


def load_model(name: str) -> Model:
    """Read a model from artefacts/. Raises ModelError naming what is there, or what is wrong with it."""
    folder = resources.files("services.scoring") / "artefacts"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))
        raise ModelError(f"there is no model {name}; known are {known}")
    return parse_model(name, file.read_bytes(), (folder / f"{name}.md").read_text(encoding="utf-8"))


def parse_model(name: str, content: bytes, card: str) -> Model:
    """A model from its file, checked as a whole before any of it is used. Raises ModelError."""
    try:
        read = _File.model_validate(json.loads(content))
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in found["loc"])
        raise ModelError(f"{name}.json: {place or 'the file'}: {found['msg'].removeprefix('Value error, ')}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name}.json: is no JSON: {str(error).splitlines()[0][:200]}") from error
    if read.model != name:
        raise ModelError(f"{name}.json: model: says that it is {read.model!r}")
    return Model(
        name=read.model,
        party_kind=read.party_kind,
        intercept=read.intercept,
        terms=[term.model_dump() for term in read.terms],
        bands={str(name): limit for name, limit in read.bands.items()},
        required_sources=frozenset(read.required_sources),
        hash=hashlib.sha256(content).hexdigest(),
        card=card,
    )


# --- What a file may hold ---

Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Word = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,79}$")]


class _Step(BaseModel, frozen=True, extra="forbid"):
    """A table: one value a bin, one for a fact that is unknown."""

    kind: Literal["step"]
    feature: Word
    edges: Annotated[list[Finite], Field(min_length=1)]
    values: list[Finite]
    missing: Finite

    @model_validator(mode="after")
    def _fits(self) -> _Step:
        if any(low >= high for low, high in pairwise(self.edges)):
            raise ValueError("edges must grow from one to the next")
        if len(self.values) != len(self.edges) + 1:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) + 1} values, not {len(self.values)}")
        return self


class _Linear(BaseModel, frozen=True, extra="forbid"):
    """A weight on a standardised value."""

    kind: Literal["linear"]
    feature: Word
    transform: Literal["identity", "log1p"]
    low: Finite
    high: Finite
    mean: Finite
    deviation: Annotated[Finite, Field(gt=0)]
    weight: Finite

    @model_validator(mode="after")
    def _fits(self) -> _Linear:
        if self.low > self.high:
            raise ValueError("low must not be above high")
        return self


class _File(BaseModel, frozen=True, extra="forbid"):
    """A model's file."""

    model: str
    party_kind: Literal["person", "firm"]
    quality: dict[str, Any]
    horizon_months: Annotated[int, Field(gt=0, strict=True)]
    intercept: Finite
    terms: Annotated[list[Annotated[_Step | _Linear, Field(discriminator="kind")]], Field(min_length=1)]
    bands: dict[Literal["A", "B", "C", "D", "E"], Annotated[Finite, Field(gt=0, le=1)]]
    required_sources: Annotated[list[Word], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> _File:
        names = [term.feature for term in self.terms]
        if len(set(names)) != len(names):
            raise ValueError("terms: a feature counts twice")
        limits = [self.bands[grade] for grade in sorted(self.bands)]
        if len(limits) < 2 or any(low >= high for low, high in pairwise(limits)) or limits[-1] != 1.0:
            raise ValueError("bands must grow from grade to grade, and the last must end at 1")
        return self
