"""Every knob of intake: unit, default, what turning it does."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.guard import BulkheadSettings
from loanmesh.runtime.migrations import When
from loanmesh.runtime.setting_rules import DatabaseUrl, Target
from loanmesh.runtime.settings import PrivacySettings, ServerSettings, ServiceSettings
from services.intake.retention import RetentionSettings


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
    watches_max: Annotated[int, Field(ge=1)] = 1000
    """Watch streams that one caller may have open on this replica; more get RESOURCE_EXHAUSTED."""
    decides: bool = True
    """Whether this replica decides. False: it only accepts and answers, and leaves deciding to the others."""


class ClientQuota(BaseModel, frozen=True, extra="forbid"):
    """How much one caller may submit to this replica."""

    a_second: Annotated[float, Field(ge=0)] = 0.0
    """Applications a second. 0: as many as it likes."""
    burst: Annotated[int, Field(ge=1)] = 1000
    """How many at once after a rest."""


class QuotaSettings(ClientQuota, frozen=True, extra="forbid"):
    """How much each caller may submit to this replica. Its name is proven by certificate or token; in plaintext it is
    what `loanmesh-client` says."""

    clients: dict[str, ClientQuota] = {}
    """Other values for clients by their names, as {"shop": {"a_second": 50, "burst": 500}}."""


class Due(BaseModel, frozen=True, extra="forbid"):
    """How long we wait for people."""

    information_days: Annotated[float, Field(gt=0)] = 14.0
    """Days an applicant has to supply what is missing."""


class ParkingSettings(BaseModel, frozen=True, extra="forbid"):
    """What happens to an application that breaks a stage: the fault of its content, or of our code."""

    attempts_max: Annotated[int, Field(ge=1, le=100)] = 5
    """After this many attempts that broke a stage it is parked: nobody works on it until an SRE releases it."""
    wait_s_first: Annotated[float, Field(gt=0)] = 1.0
    """Seconds between the first such attempt and the next; four times as long each time."""
    wait_s_max: Annotated[float, Field(gt=0)] = 60.0
    """Longest such wait, seconds."""
    due_hours: Annotated[float, Field(gt=0)] = 24.0
    """By when its caller is told that a person will have looked, hours after it was parked."""
    window: Annotated[int, Field(ge=10, le=100_000)] = 200
    """How many of the newest applications tell whether it is the application or the stage that is broken."""
    mass_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of them from which the stage counts as down, and nothing is parked for it any more."""
    mass_min: Annotated[int, Field(ge=2)] = 10
    """... and at least so many: a few bad ones on a quiet day are no bad release."""


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


class ScalerSettings(BaseModel, frozen=True, extra="forbid"):
    """How many replicas KEDA is told are wanted. Figures of one replica with a core of its own, cold, as `make bench`
    measured them; `loanmesh promotion capacity` says those of another machine, and a ScaledObject may say its own."""

    accepts_a_second: Annotated[float, Field(gt=0)] = 3000.0
    """Applications that a replica of intake accepts a second, one by one."""
    decides_a_second: Annotated[float, Field(gt=0)] = 2650.0
    """Applications that a replica of intake-worker takes through the stages a second."""
    bureau_a_second: Annotated[float, Field(gt=0)] = 1750.0
    """Applications that a replica of bureau gathers evidence for a second, all of it asked for anew."""
    scoring_a_second: Annotated[float, Field(gt=0)] = 11000.0
    """Applications that a replica of scoring scores a second."""
    pricing_a_second: Annotated[float, Field(gt=0)] = 5250.0
    """Applications that a replica of pricing prices a second."""
    drain_s: Annotated[float, Field(gt=0)] = 60.0
    """Within how many seconds a backlog should be gone. Less asks for more replicas."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of a replica that traffic alone may use; the rest is for what comes unforeseen."""
    streams_max: Annotated[int, Field(ge=1, le=1000)] = 64
    """Streams that KEDA may hold open on a replica; two a trigger of type external-push."""

    @property
    def rates(self) -> dict[str, float]:
        """What one replica does, applications a second, by service."""
        return {
            "intake": self.accepts_a_second,
            "intake-worker": self.decides_a_second,
            "bureau": self.bureau_a_second,
            "scoring": self.scoring_a_second,
            "pricing": self.pricing_a_second,
        }


class IntakeSettings(ServiceSettings):
    """INTAKE_* in the environment, `intake:` in the file."""

    model_config = SettingsConfigDict(env_prefix="INTAKE_", env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings(listen="127.0.0.1:7401")
    database_url: DatabaseUrl = SecretStr("sqlite:///var/intake.db")
    """`sqlite:///path` or `postgresql://user:password@host/name`."""
    migrate: When = "start"
    """`start` brings the tables up to date at each start. `check` only looks that `loanmesh migrate` has, and does not
    start before: so in a cluster, where a Job changes tables, once a release."""
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
    retention: RetentionSettings = RetentionSettings()
    scaler: ScalerSettings = ScalerSettings()
    parking: ParkingSettings = ParkingSettings()
