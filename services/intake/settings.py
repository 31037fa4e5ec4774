"""Every knob of intake: unit, default, what turning it does."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.guard import BulkheadSettings
from loanmesh.runtime.setting_rules import DatabaseUrl, Target
from loanmesh.runtime.settings import PrivacySettings, ServerSettings, ServiceSettings


class Lease(BaseModel, frozen=True, extra="forbid"):
    """How replicas share the work."""

    duration_s: Annotated[float, Field(gt=0)] = 10.0
    """How long a claim holds. Longer than the slowest batch; shorter means faster takeover after a crash."""
    poll_s: Annotated[float, Field(gt=0)] = 0.2
    """How often free replicas look for work that nobody holds."""


class Work(BaseModel, frozen=True, extra="forbid"):
    """How much a replica does at once."""

    batch_max: Annotated[int, Field(ge=1, le=256)] = 64
    """Applications a batch."""
    batches_in_flight: Annotated[int, Field(ge=1, le=64)] = 8
    """Most batches under way at once. A second one starts only when it is full or its first member has waited 20 ms."""
    held_max: Annotated[int, Field(ge=1)] = 1024
    """Applications held in memory; beyond, they wait in the store."""
    accepts_waiting_max: Annotated[int, Field(ge=1)] = 4096
    """Submits that wait for the disk; beyond, callers are asked to come again."""
    queue_s_max: Annotated[float, Field(gt=0)] = 1.0
    """How far behind storing may be before interactive submits are turned away; partners at half, bulk at a quarter."""
    decides: bool = True
    """Whether this replica decides. False: it only accepts and answers, and leaves deciding to the others."""


class QuotaSettings(BaseModel, frozen=True, extra="forbid"):
    """How much each caller, named by `loanmesh-client`, may submit to this replica."""

    a_second: Annotated[float, Field(ge=0)] = 0.0
    """Applications a second. 0: as many as it likes."""
    burst: Annotated[int, Field(ge=1)] = 1000
    """How many at once after a rest."""


class Due(BaseModel, frozen=True, extra="forbid"):
    """How long we wait for people."""

    information_days: Annotated[float, Field(gt=0)] = 14.0
    """Days an applicant has to supply what is missing."""


class Downstream(BaseModel, frozen=True, extra="forbid"):
    """How bureau, scoring and pricing are guarded, each by its own breaker and bulkhead. A call here is a batch."""

    breaker: BreakerSettings = BreakerSettings(window=20, minimum_calls=6, failure_rate=0.7, slow_call_s=1.8)
    """The rate is above a half, because one replica of two that hangs is the channel's business: it leaves it out.
    Slow is above bureau's budget of a second."""
    bulkhead: BulkheadSettings = BulkheadSettings(at_once_max=64, waiting_max=64)
    """Batches under way are bounded by `work` already; this bounds schedules as well."""


class IntakePrivacy(PrivacySettings, frozen=True, extra="forbid"):
    """How applications are sealed."""

    keys_file: str = "var/intake-keys.json"
    """JSON file of keys, for its owner alone; in a cluster a mounted Secret. Re-read when it changes.
    `loanmesh keys new FILE` makes one, `loanmesh keys rotate FILE` adds newer keys."""
    seal_new: bool = True
    """Whether new applications are sealed. False only while replicas of a release that cannot read them run beside."""


class IntakeSettings(ServiceSettings):
    """INTAKE_* in the environment, `intake:` in the file."""

    model_config = SettingsConfigDict(env_prefix="INTAKE_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7401")
    database_url: DatabaseUrl = SecretStr("sqlite:///var/intake.db")
    """`sqlite:///path` or `postgresql://user:password@host/name`."""
    bureau: Target = "127.0.0.1:7402"
    """Addresses of bureau: host:port, several with commas, or dns:///name:port."""
    scoring: Target = "127.0.0.1:7403"
    """Addresses of scoring."""
    pricing: Target = "127.0.0.1:7404"
    """Addresses of pricing."""
    lease: Lease = Lease()
    work: Work = Work()
    due: Due = Due()
    quota: QuotaSettings = QuotaSettings()
    downstream: Downstream = Downstream()
    privacy: IntakePrivacy = IntakePrivacy()
