"""From a promotion and what a replica does: replicas of every service, connections, what bounds, and by when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loanmesh.promotion.autoscaler import SYNC_S, Behaviour
from loanmesh.promotion.capacity import SERVICES, STAGES, Capacity, Service
from loanmesh.promotion.demand import rate_needed, source_bounds, wait_s
from loanmesh.promotion.file import Promotion

USERS: Mapping[str, tuple[Service, ...]] = {"intake": ("intake", "intake-worker"), "bureau": ("bureau",)}
"""Who holds connections to which database."""
SURGE = 1
"""Replicas of a Deployment that a rollout may have above its number; they hold connections too."""
LEAD_S_LEAST = 600.0
"""Nodes may have to be added before pods boot: no promotion is met with less than this in hand."""
LEAD_FACTOR = 1.5
_SLACK = 1e-6


@dataclass(frozen=True)
class ServicePlan:
    """One service on the day."""

    replicas: int
    """That there must be when it starts."""
    most: int
    """That an autoscaler may make of them."""
    a_second: float
    """Applications that one replica handles a second."""
    load_a_second: float
    """Applications a second that the replicas are planned for."""


@dataclass(frozen=True)
class Connections:
    """One database on the day."""

    planned: int
    """With the planned replicas and a rollout."""
    most: int
    """With as many replicas as an autoscaler may make, and a rollout."""
    available: int

    @property
    def fits(self) -> bool:
        """Whether there are enough."""
        return self.most <= self.available


@dataclass(frozen=True)
class Problem:
    """Why the target is missed, and what to do about it."""

    what: str
    do: str


@dataclass(frozen=True)
class Plan:
    """What a promotion needs."""

    arrivals_a_second: float
    """At the height."""
    needed_a_second: float
    """Decisions a second at which all are decided in time."""
    decides_a_second: float
    """Decisions a second that are planned for: what is needed, or what the tightest source allows."""
    bounds: Mapping[str, float]
    """Decisions a second that each bound would allow, the tightest first."""
    bound_by: str | None
    """The bound that keeps deciding below what is needed; None: nothing does."""
    decided_within_s: float
    """Within which time 99 of 100 are decided, by the plan; infinite where a backlog is left a day after the end."""
    services: Mapping[Service, ServicePlan]
    connections: Mapping[str, Connections]
    lead_s: float
    """How long before the start the replicas are asked for."""
    problems: tuple[Problem, ...]

    @property
    def holds(self) -> bool:
        """Whether the target is reached within all bounds."""
        return not self.problems


def make_plan(
    promotion: Promotion, capacity: Capacity, scale: float = 1.0, quotas: Mapping[str, float] | None = None
) -> Plan:
    """Plan a promotion.

    scale   multiplies all arrivals that the file expects.
    quotas  queries a second instead of what the file says, by source.
    """
    peak = scale * sum(channel.peak_a_second for channel in promotion.channels.values())
    needed = rate_needed(promotion, scale, promotion.decide_within_s)
    sources = {f"quota of {name}": rate for name, rate in source_bounds(promotion, quotas).items()}
    decides = min([needed, *sources.values()])
    by_source = decides < needed
    speeds = {name: capacity.a_second(name, promotion.new_subjects) for name in SERVICES}
    load = {name: decides if name in STAGES else peak for name in SERVICES}
    replicas = {name: _count(promotion, name, load[name] / speeds[name]) for name in SERVICES}
    # More than the plan helps where the plan lets a backlog grow; against a source's quota nothing helps.
    most = {
        name: replicas[name] if by_source and name in STAGES
        else max(replicas[name], promotion.replicas[name].most, _count(promotion, name, peak / speeds[name]))
        for name in SERVICES
    }  # fmt: skip
    connections: dict[str, Connections] = {}
    for database, limits in promotion.databases.items():
        available = limits.max_connections - limits.reserved
        users = USERS[database]
        _fit(most, replicas, users, available // limits.a_replica - SURGE * len(users))
        planned, at_most = (limits.a_replica * sum(count[user] + SURGE for user in users) for count in (replicas, most))
        connections[database] = Connections(planned, at_most, available)
    databases = {f"connections of {name}'s database": _connection_bound(promotion, speeds, name)
                 for name in promotion.databases}  # fmt: skip
    bounds = dict(sorted((sources | databases).items(), key=lambda bound: bound[1]))
    tightest = next(iter(bounds), None)
    waits_s = wait_s(promotion, scale, decides)
    return Plan(
        arrivals_a_second=peak,
        needed_a_second=needed,
        decides_a_second=decides,
        bounds=bounds,
        bound_by=tightest if tightest and bounds[tightest] < needed * (1 - _SLACK) else None,
        decided_within_s=waits_s,
        services={name: ServicePlan(replicas[name], most[name], speeds[name], load[name]) for name in SERVICES},
        connections=connections,
        lead_s=_lead_s(promotion, replicas),
        problems=tuple(_problems(promotion, needed, sources, waits_s, connections)),
    )


def _count(promotion: Promotion, service: Service, cores: float) -> int:
    return max(promotion.replicas[service].usual, math.ceil(cores / promotion.utilisation - _SLACK))


def _fit(most: dict[Service, int], least: Mapping[Service, int], users: tuple[Service, ...], room: int) -> None:
    """Lower what autoscalers may make until it fits, but not below the plan; who decides gives way to who accepts."""
    for user in reversed(users):
        over = sum(most[name] for name in users) - room
        if over > 0:
            most[user] = max(least[user], most[user] - over)


def _connection_bound(promotion: Promotion, speeds: Mapping[Service, float], database: str) -> float:
    limits = promotion.databases["intake" if database == "intake" else "bureau"]
    users = USERS[database]
    room = (limits.max_connections - limits.reserved) // limits.a_replica - SURGE * len(users)
    return max(0, room) * promotion.utilisation / sum(1 / speeds[user] for user in users)


def _lead_s(promotion: Promotion, replicas: Mapping[Service, int]) -> float:
    behaviour = Behaviour()
    climb_s = max(behaviour.climb_s(promotion.replicas[name].usual, count) for name, count in replicas.items())
    # One look may just have passed.
    lead_s = max(LEAD_S_LEAST, LEAD_FACTOR * (SYNC_S + climb_s + promotion.boot_s))
    return math.ceil(lead_s / 60) * 60.0


def _problems(
    promotion: Promotion,
    needed: float,
    sources: Mapping[str, float],
    waits_s: float,
    connections: Mapping[str, Connections],
) -> list[Problem]:
    found = []
    short = sorted((rate, name.removeprefix("quota of ")) for name, rate in sources.items())
    short = [(rate, name) for rate, name in short if rate < needed * (1 - _SLACK)]
    if short:
        grants = " and ".join(
            f"{name} for {math.ceil(promotion.sources[name].a_second * needed / rate):,}" for rate, name in short
        )
        later = f", or raise decide_within_s to {math.ceil(waits_s):,}" if math.isfinite(waits_s) else ""
        late = f"within {waits_s:,.0f} s" if math.isfinite(waits_s) else "later than a day after the end"
        found.append(
            Problem(
                f"{short[0][1]} lets {short[0][0]:,.0f} a second be decided, {needed:,.0f} are needed: 99 of 100 would"
                f" be decided {late}",
                f"ask {grants} queries a second{later}",
            )
        )
    for name, one in connections.items():
        if not one.fits:
            missing = promotion.databases["intake" if name == "intake" else "bureau"]
            found.append(
                Problem(
                    f"{name}'s database has {one.available} connections to give, the plan needs {one.planned}",
                    f"raise max_connections to {one.most + missing.reserved}, or put a pooler before it",
                )
            )
    return found
