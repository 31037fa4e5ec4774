"""A promotion replayed: arrivals, replicas that boot, autoscalers that look, a backlog, and when each is decided.

Applications are counted, not followed: those that came in one step wait and are decided together. That makes a day of
a hundred million a matter of seconds. First come, first decided, urgent classes first, one place in five by age alone,
as intake's worker does it; a source's quota is a bucket of one second's worth, as sources keep them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from loanmesh.promotion.autoscaler import SYNC_S, Autoscaler
from loanmesh.promotion.capacity import SERVICES, STAGES, Capacity, Service
from loanmesh.promotion.demand import AFTER_S_MAX, arrivals, source_bounds
from loanmesh.promotion.file import Promotion
from loanmesh.promotion.plan import Plan
from loanmesh.promotion.waiting import PRIORITIES, Waiting, percentiles
from loanmesh.runtime.replicas import Load, wanted

Scaling = Literal["keda", "hpa", "none"]
"""keda: by what intake's scaler answers and by CPU, with the plan as a floor by the clock; hpa: by CPU, with the plan
as least replicas; none: the plan's replicas, and no autoscaler."""
BEFORE_S = 300.0
"""Quiet that is lived through before the replicas of the plan are asked for."""
SETTLE_S = 10.0
"""The same where nobody scales: only quotas have to settle."""
STEPS_A_SECOND_MAX = 20
ARRIVALS_WINDOW_S = 10.0
"""Over how long intake's scaler counts arrivals."""
DRAIN_S = 60.0
"""Within which time the scaler wants a backlog gone; its default."""
CPU_TARGET = 0.6
"""Of a core; as deploy/k8s/components/hpa has it."""
CPU_LAG_S = 30.0
"""How old the CPU is that the metrics server tells."""
BOOT_SPREAD = 0.2
"""Pods boot within so much of `boot_s`, evenly."""
DOOR_S_MAX = 2.0
"""How long a caller waits for its acknowledgement."""
_POINTS_MAX = 600
"""Points of a line that is kept for a picture."""


@dataclass
class Series:
    """What is drawn, against seconds after the start."""

    at_s: list[float] = field(default_factory=list)
    arrivals_a_second: list[float] = field(default_factory=list)
    backlog: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)
    """How long those decided then had waited, on average; 0 where none was."""
    replicas: dict[Service, list[int]] = field(default_factory=lambda: {name: [] for name in SERVICES})
    """That serve."""


@dataclass(frozen=True)
class Replayed:
    """What became of the day. Times are seconds after the start of the promotion."""

    came: int
    """From start to end."""
    backlog_peak: float
    backlog_peak_at_s: float
    drained_at_s: float | None
    """When the backlog was gone for good; None: not within a day after the end."""
    decided_s: Mapping[str, float]
    """From coming in to decision, of those that came from start to end: p50, p90, p99, max."""
    acknowledged_s_max: float
    """Longest time that callers waited at the door for want of replicas of intake."""
    replicas_most: Mapping[Service, int]
    series: Series
    decide_within_s: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the plan does not hold."""
        found = []
        if self.decided_s["p99"] > self.decide_within_s:
            found.append(
                f"99 of 100 are decided within {self.decided_s['p99']:,.0f} s, not {self.decide_within_s:,.0f} s"
            )
        if self.drained_at_s is None:
            found.append("a backlog is left a day after the end")
        if self.acknowledged_s_max > DOOR_S_MAX:
            found.append(f"callers wait up to {self.acknowledged_s_max:,.0f} s for an acknowledgement")
        return tuple(found)

    @property
    def holds(self) -> bool:
        """Whether all are acknowledged and decided in time."""
        return not self.problems


class Pods:
    """The replicas of a service: those that are wanted, and those of them that serve."""

    def __init__(self, env: simpy.Environment, count: int, boot_s: float, dice: np.random.Generator) -> None:
        self._env = env
        self._boot_s = boot_s
        self._dice = dice
        self._booting = 0
        self._cancelled = 0
        self.serving = self.wanted = count
        self.most = count

    def scale(self, wanted_: int) -> None:
        """Boot or end pods until there are so many; those that still boot end first."""
        more = wanted_ - self.wanted
        self.wanted = wanted_
        if more > 0:
            for _ in range(more):
                self._booting += 1
                self._env.process(self._boot())
        else:
            unborn = min(-more, self._booting - self._cancelled)
            self._cancelled += unborn
            self.serving -= -more - unborn

    def _boot(self) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(self._boot_s * self._dice.uniform(1 - BOOT_SPREAD, 1 + BOOT_SPREAD))
        self._booting -= 1
        if self._cancelled:
            self._cancelled -= 1
            return
        self.serving += 1
        self.most = max(self.most, self.serving)


class _Day:
    """One replay under way. The clock of `env` starts `before` seconds ahead of the promotion."""

    def __init__(
        self, promotion: Promotion, capacity: Capacity, plan: Plan, scale: float, quotas: Mapping[str, float] | None,
        scaling: Scaling, seed: int, step_s: float,
        planned: bool,
    ) -> None:  # fmt: skip
        self.env = simpy.Environment()
        self.promotion, self.plan, self.scaling, self.step_s, self.planned = (
            promotion, plan, scaling, step_s, planned)  # fmt: skip
        self.before_s = SETTLE_S if scaling == "none" else BEFORE_S + plan.lead_s
        self.dice = np.random.default_rng(seed)
        self.rates = [
            (PRIORITIES.index(channel.priority), arrivals(promotion, scale, name))
            for name, channel in promotion.channels.items()
        ]
        self.speeds = {name: capacity.a_second(name, promotion.new_subjects) for name in SERVICES}
        self.quotas = source_bounds(promotion, quotas)
        self.tokens = dict(self.quotas)
        first = {
            name: plan.services[name].replicas if scaling == "none" and planned else promotion.replicas[name].usual
            for name in SERVICES
        }
        self.pods = {name: Pods(self.env, first[name], promotion.boot_s, self.dice) for name in SERVICES}
        self.door: deque[list[float]] = deque()
        self.waiting = Waiting()
        self.lately: deque[tuple[float, float]] = deque()
        self.used = {name: deque([(0.0, 0.0)]) for name in SERVICES}
        self.waits: list[tuple[float, float]] = []
        self.came = self.acknowledged_s_max = self.peak = self.peak_at_s = 0.0
        self.empty_since_s: float | None = 0.0
        self.series = Series()
        self._every = 1
        self._steps = 0

    @property
    def at_s(self) -> float:
        # Tenths add up to a little less than they should: a step too many at the height would be the price.
        return round(float(self.env.now) - self.before_s, 6)

    @property
    def _idle(self) -> bool:
        return self.waiting.count < 1 and not self.door

    # --- Traffic ---

    def traffic(self) -> Generator[simpy.Event, Any, None]:
        length_s, step_s = self.promotion.length_s, self.step_s
        while True:
            at_s = self.at_s
            came = [int(self.dice.poisson(max(0.0, rate(at_s)) * step_s)) for _, rate in self.rates]
            if 0 <= at_s < length_s:
                self.came += sum(came)
            for (priority, _), count in zip(self.rates, came, strict=True):
                if count:
                    self.door.append([at_s, float(count), priority])
            self._accept()
            self._decide()
            self._note(sum(came))
            if at_s >= length_s and (self._idle or at_s > length_s + AFTER_S_MAX):
                return
            yield self.env.timeout(step_s)

    def _accept(self) -> None:
        room = whole = self.pods["intake"].serving * self.speeds["intake"] * self.step_s
        while room > 1e-9 and self.door:
            first = self.door[0]
            part = min(room, first[1])
            room -= part
            first[1] -= part
            self.waiting.add(int(first[2]), first[0], part)
            self.acknowledged_s_max = max(self.acknowledged_s_max, self.at_s - first[0])
            if first[1] <= 1e-9:
                self.door.popleft()
        self._use("intake", whole - room)
        # The scaler counts what is stored: who stands at the door is not seen.
        self.lately.append((self.at_s, whole - room))
        while self.lately[0][0] <= self.at_s - ARRIVALS_WINDOW_S:
            self.lately.popleft()

    def _decide(self) -> None:
        room = min(self.pods[name].serving * self.speeds[name] for name in STAGES) * self.step_s
        for source, a_second in self.quotas.items():
            self.tokens[source] = min(max(1.0, a_second), self.tokens[source] + a_second * self.step_s)
            room = min(room, self.tokens[source])
        taken = self.waiting.take(room)
        done = sum(part for _, part in taken)
        for source in self.tokens:
            self.tokens[source] -= done
        for name in STAGES:
            self._use(name, done)
        # Within the step, those who came and those who are decided are spread evenly.
        self.waits += [
            (self.at_s - came_at + self.step_s / 2, part)
            for came_at, part in taken
            if 0 <= came_at < self.promotion.length_s
        ]
        self._last_wait_s = sum((self.at_s - at) * part for at, part in taken) / done if done else 0.0

    def _use(self, name: Service, applications: float) -> None:
        """Cores used in this step, over those there are."""
        cores = applications / self.speeds[name] / self.step_s
        used = self.used[name]
        used.append((self.at_s, cores))
        while len(used) > 1 and used[1][0] <= self.at_s - CPU_LAG_S:
            used.popleft()

    def _note(self, came: float) -> None:
        at_s, backlog = self.at_s, self.waiting.count
        if backlog > self.peak and at_s >= 0:
            self.peak, self.peak_at_s = backlog, at_s
        if backlog >= 1:
            self.empty_since_s = None
        elif self.empty_since_s is None:
            self.empty_since_s = at_s
        if self._steps % self._every == 0 and at_s >= -self.plan.lead_s:
            self.series.at_s.append(at_s)
            self.series.arrivals_a_second.append(came / self.step_s)
            self.series.backlog.append(backlog)
            self.series.wait_s.append(self._last_wait_s)
            for name, line in self.series.replicas.items():
                line.append(self.pods[name].serving)
            if len(self.series.at_s) >= 2 * _POINTS_MAX:
                self._thin()
        self._steps += 1

    def _thin(self) -> None:
        """Every second point, from now on too: a picture has no use for more, and a long day has many."""
        self._every *= 2
        series = self.series
        lines: list[list[Any]] = [series.at_s, series.arrivals_a_second, series.backlog, series.wait_s]
        for line in (*lines, *series.replicas.values()):
            del line[1::2]

    # --- Replicas ---

    def autoscale(self, name: Service) -> Generator[simpy.Event, Any, None]:
        planned, pods = self.plan.services[name], self.pods[name]
        usual = self.promotion.replicas[name].usual
        scaler = Autoscaler(usual, max(planned.most, planned.replicas, usual))
        floor_from_s = -self.plan.lead_s
        floor_to_s = self.promotion.length_s + self.promotion.decide_within_s
        # Controllers do not look in step.
        yield self.env.timeout(float(self.dice.uniform(0, SYNC_S)))
        while True:
            floor = planned.replicas if self.planned and floor_from_s <= self.at_s < floor_to_s else usual
            totals = [float(floor), self._cpu(name), *([self._keda(name)] if self.scaling == "keda" else [])]
            pods.scale(scaler.replicas(self.at_s, pods.wanted, totals))
            yield self.env.timeout(SYNC_S)

    def _keda(self, name: Service) -> float:
        load = Load(self.waiting.count, sum(count for _, count in self.lately) / ARRIVALS_WINDOW_S)
        return wanted(load, self.speeds[name], DRAIN_S, self.promotion.utilisation, backlog_counts=name != "intake")

    def _cpu(self, name: Service) -> float:
        serving, cores = self.pods[name].serving, self.used[name][0][1]
        # Over all pods of the Deployment; those that boot use nothing yet and count as such.
        return cores / CPU_TARGET if serving else 0.0

    def run(self) -> Replayed:
        traffic = self.env.process(self.traffic())
        if self.scaling != "none":
            for name in SERVICES:
                self.env.process(self.autoscale(name))
        self.env.run(until=traffic)
        return Replayed(
            came=int(self.came),
            backlog_peak=self.peak,
            backlog_peak_at_s=self.peak_at_s,
            drained_at_s=self.empty_since_s,
            decided_s=percentiles(self.waits),
            acknowledged_s_max=self.acknowledged_s_max,
            replicas_most={name: pods.most for name, pods in self.pods.items()},
            series=self.series,
            decide_within_s=self.promotion.decide_within_s,
        )


def replay(
    promotion: Promotion,
    capacity: Capacity,
    plan: Plan,
    *,
    scale: float = 1.0,
    quotas: Mapping[str, float] | None = None,
    scaling: Scaling = "keda",
    seed: int = 1,
    step_s: float = 1.0,
    planned: bool = True,
) -> Replayed:
    """Live through a promotion, planned for as `plan` says.

    scale   multiplies all arrivals that the file expects.
    quotas  queries a second instead of what the file says, by source.
    step_s  how finely time is cut; at least a twentieth of a second.
    planned  False: nobody applied the plan; only autoscalers are there, from the usual replicas up to what it allows.
    """
    if step_s < 1 / STEPS_A_SECOND_MAX:
        raise ValueError(f"step_s must be at least {1 / STEPS_A_SECOND_MAX:g}")
    return _Day(promotion, capacity, plan, scale, quotas, scaling, seed, step_s, planned).run()
