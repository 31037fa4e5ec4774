"""Every knob of bureau: unit, default, what turning it does."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.degradation import StepSettings
from loanmesh.runtime.migrations import When
from loanmesh.runtime.setting_rules import DatabaseUrl, HttpUrl
from loanmesh.runtime.settings import PrivacySettings, ServerSettings, ServiceSettings


class Gather(BaseModel, frozen=True, extra="forbid"):
    """How sources are asked."""

    budget_s: Annotated[float, Field(gt=0)] = 1.0
    """How long a profile waits for its sources; what comes later is kept for the next look."""
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """How long one source may take, a second try included. Above the budget: a slow answer still lands in the cache."""
    at_once_max: Annotated[int, Field(ge=1)] = 64
    """Queries under way at one source (its bulkhead)."""
    waiting_max: Annotated[int, Field(ge=1)] = 2000
    """Queries that may wait at one source besides; beyond, the source counts as missing for now."""
    retry_s: Annotated[float, Field(gt=0)] = 1.0
    """When to look again after a source gave no answer."""


class BrownoutSettings(BaseModel, frozen=True, extra="forbid"):
    """What is left out while a source is overloaded. Load: the longest wait at its bulkhead, 1 for the whole budget."""

    serve_cached: StepSettings = StepSettings(enter_at=0.5, leave_below=0.1)
    """When an answer that is usable but no longer fresh is served without asking. A decline never rests on it."""
    skip_optional_sources: StepSettings = StepSettings(enter_at=1.0, leave_below=0.2)
    """When an optional source is not asked at all: what is asked now would come too late anyway."""
    busy_s: Annotated[float, Field(ge=0)] = 1.0
    """How long a source that said it is too busy (429) is believed, seconds: a load of 1 for serve_cached."""
    optional: tuple[str, ...] = ("bank_flow",)
    """Sources that every product of policy may do without; naming another makes applications wait for it."""


class BureauSettings(ServiceSettings):
    """BUREAU_* in the environment, `bureau:` in the file."""

    model_config = SettingsConfigDict(env_prefix="BUREAU_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7402")
    database_url: DatabaseUrl = SecretStr("sqlite:///var/bureau.db")
    """`sqlite:///path` or `postgresql://user:password@host/name`."""
    migrate: When = "start"
    """`start` brings the tables up to date at each start. `check` only looks that `loanmesh migrate` has, and does not
    start before: so in a cluster, where a Job changes tables, once a release."""
    sources_url: HttpUrl = "http://127.0.0.1:7405"
    """Where the sources are reached; each under /v1/{source}/query."""
    sources_token_file: str = ""
    """File with the token that proves us to the sources, over https only; read again when it changes. Empty: none."""
    gather: Gather = Gather()
    breaker: BreakerSettings = BreakerSettings()
    """When a source is left alone for a while; each source has its own breaker, all with these settings."""
    brownout: BrownoutSettings = BrownoutSettings()
    privacy: PrivacySettings = PrivacySettings(keys_file="var/bureau-keys.json")
    """Keys that the cache is sealed and looked up with."""
    query_fen: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """What a query of each source costs by contract, fen, e.g. {"central_bank": 200}; a source not named costs nothing.
    Only counted (`loanmesh.source.spend`): it changes no decision."""
