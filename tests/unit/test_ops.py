"""OpsService and the metrics: both say what the process's vitals say; an order is obeyed once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any, cast

import pytest
from lending.ops.v1 import ops_service_pb2 as pb
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from loanmesh.runtime import semconv, telemetry
from loanmesh.runtime.breaker import BreakerSettings
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.degradation import Load, Step, StepSettings
from loanmesh.runtime.errors import DependencyDown, NotFound, RequestIdConflict
from loanmesh.runtime.guard import BulkheadSettings, Guard, Refused, Verdict, make_guard
from loanmesh.runtime.loop_lag import Heartbeat
from loanmesh.runtime.ops import OpsServicer
from loanmesh.runtime.validation import violations
from loanmesh.runtime.vitals import BACKLOG_EVERY, SAMPLE_EVERY_S, Decision, Queue, Resting, Standing, Vitals

NO_CONTEXT = cast(Any, None)


class Process:
    """A process with one source, one queue and one step."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        settings = BreakerSettings(minimum_calls=2, open_s=10, open_s_max=10, jitter=0)
        self.guard = make_guard("court", "source", settings, BulkheadSettings(), self.clock, random.Random(1))
        self.load = 0.0
        step = Step("serve_cached", "court", StepSettings(enter_at=0.5, leave_below=0.1, calm_s=2),
                    lambda: Load(self.load, "a long queue"), self.clock)  # fmt: skip
        self.vitals = Vitals([self.guard], [Queue("accepts", lambda: 3, 100)], [step])
        self.ops = OpsServicer("bureau", "bureau-1", self.clock.now(), self.vitals, Heartbeat(self.clock))

    async def status(self) -> pb.GetStatusResponse:
        return await self.ops.GetStatus(pb.GetStatusRequest(), NO_CONTEXT)

    async def court(self) -> pb.Dependency:
        answer = await self.ops.ListDependencies(pb.ListDependenciesRequest(), NO_CONTEXT)
        return answer.dependencies[0]

    async def order(self, request_id: str, override: pb.Override.ValueType, name: str = "court") -> pb.Dependency:
        request = pb.OverrideDependencyRequest(
            name=f"dependencies/{name}", request_id=request_id, override=override, actor="li.na", reason="maintenance"
        )
        assert not violations(request)
        return (await self.ops.OverrideDependency(request, NO_CONTEXT)).dependency


async def call(guard: Guard, *verdicts: Verdict) -> None:
    for verdict in verdicts:

        async def ask(verdict: Verdict = verdict) -> Verdict:
            return verdict

        await guard.call(ask, lambda said: said)


async def test_status_says_what_rests_and_until_when() -> None:
    process = Process()
    assert not (await process.status()).resting
    process.vitals.standing = Standing(0.0, 0.0, 0, 0, (Resting("source_missing:court", 300, 1_800_000_000.5),))
    (rest,) = (await process.status()).resting
    assert (rest.waiting_for, rest.applications) == ("source_missing:court", 300)
    assert rest.retry_time.ToMilliseconds() == 1_800_000_000_500


async def test_status_says_who_it_is_and_what_waits() -> None:
    process = Process()
    status = await process.status()
    assert (status.service, status.instance, status.draining) == ("bureau", "bureau-1", False)
    assert status.start_time.ToDatetime() == process.clock.now().replace(tzinfo=None)
    assert [(q.name, q.length, q.limit) for q in status.queues] == [("accepts", 3, 100)]
    assert not status.HasField("backlog")
    process.vitals.draining, process.vitals.backlog = True, 0
    status = await process.status()
    assert status.draining
    assert status.HasField("backlog")


async def test_status_says_which_steps_are_in_force_since_when_and_why() -> None:
    process = Process()
    assert not (await process.status()).degradations
    process.load = 1.0
    (step,) = (await process.status()).degradations
    assert (step.step, step.subject, step.cause) == ("serve_cached", "court", "a long queue")
    assert step.start_time.ToDatetime() == process.clock.now().replace(tzinfo=None)


async def test_a_dependency_shows_its_breaker_with_cause_history_and_time_to_retry() -> None:
    process = Process()
    await call(process.guard, Verdict.WELL, Verdict.BUSY, Verdict.ILL)
    with pytest.raises(Refused):
        await call(process.guard, Verdict.ILL)
    shown = await process.court()
    assert (shown.name, shown.kind) == ("dependencies/court", pb.Dependency.KIND_SOURCE)
    assert (shown.calls, shown.failures, shown.overloads, shown.refusals) == (3, 1, 1, 1)
    assert (shown.breaker_state, shown.breaker_cause) == (pb.BREAKER_STATE_OPEN, "1 of 2 calls failed")
    assert shown.retry_time.seconds - shown.breaker_change_time.seconds == 10
    process.clock.advance(10)
    await call(process.guard, *[Verdict.WELL] * 3)
    shown = await process.court()
    assert not shown.HasField("retry_time")
    assert [change.state for change in shown.breaker_history] == [
        pb.BREAKER_STATE_OPEN, pb.BREAKER_STATE_HALF_OPEN, pb.BREAKER_STATE_CLOSED,
    ]  # fmt: skip


async def test_an_order_is_obeyed_once_and_a_late_repeat_undoes_nothing() -> None:
    process = Process()
    paused = await process.order("pause-0001", pb.OVERRIDE_FORCED_OPEN)
    assert (paused.breaker_state, paused.breaker_cause) == (
        pb.BREAKER_STATE_FORCED_OPEN, "forced open by li.na: maintenance",
    )  # fmt: skip
    with pytest.raises(Refused):
        await call(process.guard, Verdict.WELL)
    await process.order("resume-001", pb.OVERRIDE_AUTOMATIC)
    late = await process.order("pause-0001", pb.OVERRIDE_FORCED_OPEN)
    assert late.breaker_state == pb.BREAKER_STATE_CLOSED
    with pytest.raises(RequestIdConflict):
        await process.order("pause-0001", pb.OVERRIDE_FORCED_CLOSED)


async def test_an_unknown_dependency_is_refused_with_those_there_are() -> None:
    with pytest.raises(NotFound, match="dependencies/moon; it has: dependencies/court"):
        await Process().order("pause-0001", pb.OVERRIDE_FORCED_OPEN, name="moon")


@pytest.mark.parametrize(
    "wrong", [{"name": "court"}, {"request_id": "x"}, {"override": 0}, {"override": 9}, {"actor": ""}]
)
def test_an_order_that_breaks_the_contract_names_the_field(wrong: dict[str, Any]) -> None:
    sound = {"name": "dependencies/court", "request_id": "pause-0001", "override": 2, "actor": "li.na"}
    (violation,) = violations(pb.OverrideDependencyRequest(**{**sound, **wrong}))
    assert violation[0] == next(iter(wrong))


async def test_sampling_gives_up_steps_and_counts_the_backlog_though_the_store_is_away() -> None:
    process = Process()
    process.load = 1.0
    await process.status()
    process.load = 0.0
    counts: Iterator[int | Exception] = iter([7, DependencyDown("away"), 9])

    async def count() -> int:
        counted = next(counts)
        if isinstance(counted, Exception):
            raise counted
        return counted

    process.vitals.count_backlog = count
    seen = []
    sampling = asyncio.create_task(process.vitals.sample_forever(process.clock))
    started = process.clock.monotonic()
    while process.clock.monotonic() - started < 2.5 * BACKLOG_EVERY * SAMPLE_EVERY_S:
        await asyncio.wait([sampling], timeout=0)
        seen.append(process.vitals.backlog)
    sampling.cancel()
    await asyncio.wait([sampling])
    assert seen[0] == 7
    assert seen[-1] == 9
    assert set(seen) == {7, 9}
    assert not process.vitals.steps[0].in_force


async def test_metrics_say_the_same_without_ids_or_personal_data(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    process = Process()
    record_lag = telemetry.observe(process.vitals)
    record_lag(0.02)
    await call(process.guard, Verdict.ILL, Verdict.ILL)
    process.vitals.decisions[Decision("approved", "consumer_loan", "A")] += 5
    process.vitals.degradations["without_bank_flow"] += 2
    process.vitals.backlog = 12
    process.load = 1.0
    await process.status()

    data = reader.get_metrics_data()
    assert data
    points: dict[tuple[str, str], float] = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            at = ",".join(str(value) for _, value in sorted((point.attributes or {}).items()))
            points[metric.name, at] = (
                cast(Any, point).count if metric.name == semconv.LOOP_LAG else cast(Any, point).value
            )
    provider.shutdown()
    assert points["loanmesh.breaker.state", "open,court"] == 1
    assert points["loanmesh.breaker.state", "closed,court"] == 0
    assert points["loanmesh.breaker.changes", "open,court"] == 1
    assert points["loanmesh.dependency.calls", "court,failed"] == 2
    assert points["loanmesh.bulkhead.in_use", "court"] == 0
    assert points["loanmesh.queue.length", "accepts"] == 3
    assert points["loanmesh.backlog", ""] == 12
    assert points["loanmesh.decisions", "A,approved,consumer_loan"] == 5
    assert points["loanmesh.degradations", "without_bank_flow"] == 2
    assert points["loanmesh.degradation.in_force", "serve_cached,court"] == 1
    assert points[semconv.LOOP_LAG, ""] == 1
