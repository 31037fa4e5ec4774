"""Every knob of scoring."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.setting_rules import one_of
from loanmesh.runtime.settings import ServerSettings, ServiceSettings

_FILES = (resources.files("services.scoring") / "artefacts").iterdir()
Model = Annotated[
    str, one_of(sorted(file.name.removesuffix(".json") for file in _FILES if file.name.endswith(".json")))
]


class ScoringSettings(ServiceSettings):
    """SCORING_* in the environment, `scoring:` in the file."""

    model_config = SettingsConfigDict(env_prefix="SCORING_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7403")
    consumer_model: Model = "consumer-2026-11"
    """Model for persons, a file in artefacts/."""
    firm_model: Model = "firm-2026-11"
    """Model for firms, a file in artefacts/."""
