"""Every knob of pricing; the rest is policy, and stands in policies/."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.setting_rules import one_of
from loanmesh.runtime.settings import ServerSettings, ServiceSettings

_FOLDERS = (resources.files("services.pricing") / "policies").iterdir()
Version = Annotated[str, one_of(sorted(folder.name for folder in _FOLDERS if folder.is_dir()))]


class PricingSettings(ServiceSettings):
    """PRICING_* in the environment, `pricing:` in the file."""

    model_config = SettingsConfigDict(env_prefix="PRICING_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7404")
    policy: Version = "cn-demo-2026-11"
    """Policy version in force, a folder in policies/."""
