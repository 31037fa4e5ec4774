"""Every knob of scoring."""

from __future__ import annotations

from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.settings import ServerSettings, ServiceSettings


class ScoringSettings(ServiceSettings):
    """SCORING_* in the environment, `scoring:` in the file."""

    model_config = SettingsConfigDict(env_prefix="SCORING_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7403")
    consumer_model: str = "consumer-2026-11"
    """Model for persons, a file in artefacts/."""
    firm_model: str = "firm-2026-11"
    """Model for firms, a file in artefacts/."""
