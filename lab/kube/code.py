"""What the code says, for the manifests to agree with: settings, deadlines, connections. The only look inside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from loanmesh.runtime import authorisation
from loanmesh.runtime.database import ACQUIRE_S, COMMIT_S, PostgresDatabase
from loanmesh.runtime.knobs import Knob, knobs
from loanmesh.runtime.settings import ServiceSettings, prefix_of
from services.bureau.settings import BureauSettings
from services.intake import mesh
from services.intake.settings import IntakeSettings
from services.pricing.settings import PricingSettings
from services.scoring.settings import ScoringSettings

SETTINGS: Mapping[str, type[ServiceSettings]] = {
    "intake": IntakeSettings,
    "bureau": BureauSettings,
    "scoring": ScoringSettings,
    "pricing": PricingSettings,
}
WITH_TABLES = tuple(name for name, class_ in SETTINGS.items() if "database_url" in class_.model_fields)
CALLS_S_MAX = max(mesh.DEADLINES_S.values())
"""The longest call between services, seconds."""
BATCH_S_MAX = sum(mesh.DEADLINES_S[call] for call in ("GatherProfiles", "ScoreProfiles", "PriceApplications"))
"""How long a batch that has begun may take through all stages, seconds."""
COMMIT_S_MAX = ACQUIRE_S + COMMIT_S
"""How long its commit may then take where the database is slow: to get a connection, and a statement. Seconds."""
POOL_MAX: int = inspect.signature(PostgresDatabase.connect).parameters["connections"].default
"""Connections to PostgreSQL that one replica may open."""
PROBED = ("readiness", "liveness")
"""What a service tells of its health to who probes it."""


@functools.lru_cache(maxsize=8)
def settings_of(service: str) -> Mapping[str, Knob]:
    """Every setting of a service by its name in the environment."""
    class_ = SETTINGS[service]
    return {knob.name: knob for knob in knobs(class_, prefix_of(class_))}


def default_of(service: str, name: str) -> Any:
    """What a setting is where nobody sets it."""
    return settings_of(service)[name].value(SETTINGS[service].model_construct())


@functools.lru_cache(maxsize=1000)
def refused(service: str, name: str, value: str) -> str:
    """What a setting may be, where this value is none of it; empty where it is one."""
    knob = settings_of(service)[name]
    nested: Any = value
    for word in reversed(knob.path):
        nested = {word: nested}
    if knob.json or knob.secret:
        return ""
    try:
        SETTINGS[service](**nested)
    except ValidationError as error:
        if any(tuple(str(part) for part in found["loc"]) == knob.path for found in error.errors()):
            return knob.allowed or "another value"
    return ""


BadTable = authorisation.BadTable


def lenders_of(text: str, file: str) -> Mapping[str, Sequence[str]]:
    """For which lenders callers may act, by an access table in place of the shipped one. Raises BadTable."""
    return authorisation.table_of(text, file).lenders


def lets(pattern: str, path: str) -> bool:
    """Whether a line of the table is about a caller."""
    return authorisation.matches(pattern, path)
