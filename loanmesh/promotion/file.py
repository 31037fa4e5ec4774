"""promotion.yaml: what a promotion will ask of the mesh, and within which bounds. Data, written by people."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, Field, model_validator

from loanmesh.promotion.capacity import SERVICES, Service
from loanmesh.promotion.wrong import read_yaml

Kind = Literal["person", "firm"]
KINDS: tuple[Kind, ...] = ("person", "firm")
LENGTH_MAX = dt.timedelta(days=14)
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ValueError, OSError) as error:  # Not found is a KeyError's child in name only: ZoneInfoNotFoundError.
        raise ValueError("must be a time zone such as Asia/Shanghai") from error
    except KeyError as error:
        raise ValueError("must be a time zone such as Asia/Shanghai") from error
    return name


def _label(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?", name):
        raise ValueError("must be lower-case letters, digits and hyphens, at most 42, as Kubernetes names are")
    return name


def _local(time: dt.datetime) -> dt.datetime:
    if time.tzinfo is not None:
        raise ValueError("must have no offset; `timezone` says which clock it is of")
    return time


Local = Annotated[dt.datetime, AfterValidator(_local)]


class Channel(BaseModel, frozen=True, extra="forbid"):
    """Where applications come from."""

    usual_a_second: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    """Applications a second on a usual day, as measured."""
    peak_a_second: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
    """Applications a second at the height of the promotion, as expected."""
    priority: Literal["interactive", "partner", "bulk"] = "interactive"
    kinds: dict[Kind, Share] = {"person": 1.0}
    """Share of each kind of applicant; together 1."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(sum(self.kinds.values()) - 1) > 1e-6:
            raise ValueError(f"kinds must add up to 1, not {sum(self.kinds.values()):g}")
        return self


class Quota(BaseModel, frozen=True, extra="forbid"):
    """What a source grants us."""

    a_second: Positive
    """Queries a second."""
    asked_for: Annotated[list[Kind], Field(min_length=1)] = list(KINDS)
    """For which kinds of applicants it is asked."""


class DatabaseLimits(BaseModel, frozen=True, extra="forbid"):
    """A PostgreSQL server that one service has to itself."""

    max_connections: Annotated[int, Field(gt=0, le=100_000)]
    reserved: Annotated[int, Field(ge=0)] = 10
    """Of these for superusers, backups and migrations."""
    a_replica: Annotated[int, Field(gt=0, le=100)] = 4
    """Connections in a replica's pool."""

    @model_validator(mode="after")
    def _something_left(self) -> Self:
        if self.reserved >= self.max_connections:
            raise ValueError(f"reserved, {self.reserved}, must be less than max_connections, {self.max_connections}")
        return self


class Range(BaseModel, frozen=True, extra="forbid"):
    """How many replicas there are on a usual day, and how many an autoscaler may make of them."""

    usual: Annotated[int, Field(ge=1, le=10_000)] = 2
    most: Annotated[int, Field(ge=1, le=10_000)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.most < self.usual:
            raise ValueError(f"most, {self.most}, must not be less than usual, {self.usual}")
        return self


class Promotion(BaseModel, frozen=True, extra="forbid"):
    """One promotion."""

    name: Annotated[str, AfterValidator(_label)]
    timezone: Annotated[str, AfterValidator(_zone)]
    start: Local
    """Local time at which everybody comes."""
    peak_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How long the height lasts, seconds; then arrivals fall to the usual in a straight line until `end`. Absent: until
    `end`."""
    end: Local
    channels: Annotated[dict[str, Channel], Field(min_length=1, max_length=100)]
    decide_within_s: Positive
    """By when an application should be decided, seconds after it came, 99 of 100."""
    new_subjects: Share = 1.0
    """Share of the applications whose evidence has to be asked for; the others' is in bureau's cache."""
    sources: dict[str, Quota] = {}
    """Sources that grant only so much. The others bound nothing."""
    databases: dict[Literal["intake", "bureau"], DatabaseLimits] = {}
    """Bounds on connections. Absent: not checked."""
    boot_s: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """From a pod that is wanted to one that serves: schedule, pull, start, ready."""
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of a replica's core that is planned with."""
    replicas: dict[Service, Range]
    """The range of each service, as its autoscaler has it on a usual day."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.start < self.end <= self.start + LENGTH_MAX:
            raise ValueError(f"end must be after start and within {LENGTH_MAX.days} days of it")
        if self.peak_s is not None and self.peak_s > self.length_s:
            raise ValueError(f"peak_s must not be longer than from start to end, {self.length_s:g} s")
        if missing := [name for name in SERVICES if name not in self.replicas]:
            raise ValueError(f"replicas must name {', '.join(missing)}")
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The clock of `start` and `end`."""
        return ZoneInfo(self.timezone)

    @property
    def length_s(self) -> float:
        """From start to end, seconds as they pass."""
        zone = self.zone
        ends, starts = (time.replace(tzinfo=zone).astimezone(dt.UTC) for time in (self.end, self.start))
        return (ends - starts).total_seconds()

    @property
    def height_s(self) -> float:
        """How long the height lasts."""
        return self.length_s if self.peak_s is None else self.peak_s


def read_promotion(path: Path) -> Promotion:
    """The promotion that a file describes. Raises WrongFile with every problem that it has."""
    return read_yaml(path, Promotion)
