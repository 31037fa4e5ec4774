"""The scaler: how many replicas follow from the load, what a ScaledObject may ask, and what KEDA hears."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
from externalscaler import externalscaler_pb2 as pb
from hypothesis import given, settings
from hypothesis.strategies import floats, integers

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown, InvalidRequest, Overloaded
from loanmesh.runtime.replicas import Load, wanted
from services.intake.estimate import Estimate
from services.intake.scaler import COUNT_MAX, WINDOW_S, Scaler, read_ask
from services.intake.scaler_servicer import LOOK_S, METRIC, STREAM_S, ScalerServicer
from services.intake.settings import ScalerSettings

SETTINGS = ScalerSettings(
    accepts_a_second=1000, decides_a_second=100, bureau_a_second=50, scoring_a_second=400, pricing_a_second=200,
    drain_s=60, utilisation=0.5, streams_max=2,
)  # fmt: skip


# --- The formula ---


def test_a_backlog_over_rate_and_drain_time_beside_what_comes_in() -> None:
    assert wanted(Load(6000, 0), a_second=10, drain_s=60, utilisation=0.7) == pytest.approx(10)
    assert wanted(Load(6000, 40), a_second=10, drain_s=60, utilisation=0.7) == pytest.approx(14)


def test_traffic_alone_leaves_room_in_each_replica() -> None:
    assert wanted(Load(0, 70), a_second=10, drain_s=60, utilisation=0.7) == pytest.approx(10)


def test_nothing_to_do_wants_no_replica() -> None:
    assert wanted(Load(0, 0), a_second=10, drain_s=60, utilisation=0.7) == 0


def test_who_only_accepts_is_not_asked_to_drain() -> None:
    assert wanted(Load(1e6, 7), a_second=10, drain_s=60, utilisation=0.7, backlog_counts=False) == pytest.approx(1)


def test_a_source_that_bounds_everybody_does_not_call_for_ever_more_replicas() -> None:
    """Ten more replicas at a source's quota each do a tenth; believing that would ask for ten times as many again."""
    slow = wanted(Load(6000, 0), a_second=10, drain_s=60, utilisation=0.7, speed=0.01)
    assert slow == wanted(Load(6000, 0), a_second=10, drain_s=60, utilisation=0.7, speed=0.5) == pytest.approx(20)


@settings(deadline=None)
@given(integers(0, 10**6), integers(0, 10**4), floats(0.1, 1e4), floats(1, 3600), floats(0.1, 1), floats(0, 10))
def test_what_is_wanted_drains_in_time_while_traffic_goes_on(
    backlog: int, arrivals: int, rate: float, drain_s: float, utilisation: float, speed: float
) -> None:
    replicas = wanted(Load(backlog, arrivals), rate, drain_s, utilisation, speed=speed)
    done = replicas * rate * min(2.0, max(0.5, speed)) * drain_s
    assert done >= (backlog + arrivals * drain_s) * (1 - 1e-9)


# --- What may be asked ---


def test_a_trigger_that_names_its_service_gets_our_figures() -> None:
    ask = read_ask({"scalerAddress": "intake:7401", "service": "bureau"}, SETTINGS)
    assert (ask.service, ask.a_second, ask.drain_s, ask.utilisation) == ("bureau", 50, 60, 0.5)


def test_a_trigger_may_bring_its_own_figures() -> None:
    own = {"service": "bureau", "ratePerReplica": "80.5", "drainSeconds": "30", "utilisation": "1"}
    ask = read_ask(own, SETTINGS)
    assert (ask.a_second, ask.drain_s, ask.utilisation) == (80.5, 30, 1)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "service: is missing; it must be one of intake, intake-worker, bureau, scoring, pricing"),
        ({"service": "intakes"}, "service: is 'intakes'; it must be one of"),
        ({"service": "bureau", "drainSeconds": "0"}, "drainSeconds: is '0'; it must be a number above 0 and at most"),
        ({"service": "bureau", "drainSeconds": "soon"}, "drainSeconds: is 'soon'; it must be a number"),
        ({"service": "bureau", "ratePerReplica": "nan"}, "ratePerReplica: is 'nan'"),
        ({"service": "bureau", "utilisation": "1.5"}, "utilisation: is '1.5'; it must be a number above 0 and"),
        ({"service": "bureau", "drainSecond": "60"}, "has no 'drainSecond'; known are service, ratePerReplica"),
    ],
)  # fmt: skip
def test_a_trigger_that_cannot_be_is_refused_by_key_value_and_rule(metadata: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidRequest, match="scalerMetadata") as refused:
        read_ask(metadata, SETTINGS)
    assert says in str(refused.value)


# --- What KEDA hears ---


class Mesh:
    """What the store counts."""

    def __init__(self, backlog: int = 0, arrived: int = 0) -> None:
        self.waiting, self.came = backlog, arrived
        self.counted: list[float] = []
        self.down = False

    async def backlog(self) -> list[tuple[int, int, int, int]]:
        return [(1, 0, self.waiting, 1)]

    async def arrived(self, since: float, at_most: int) -> int:
        await asyncio.sleep(0)  # noqa: TID251  Lets the others that ask come in meanwhile; no time passes.
        if self.down:
            raise DependencyDown("no connection")
        self.counted.append(since)
        return min(self.came, at_most)


def served(mesh: Mesh, clock: FakeClock, estimate: Estimate | None = None) -> ScalerServicer:
    scaler = Scaler(estimate or Estimate(mesh.backlog, clock), mesh.arrived, SETTINGS, clock)
    return ScalerServicer(scaler, clock, SETTINGS.streams_max)


def asked(service: str = "bureau", **more: str) -> pb.ScaledObjectRef:
    return pb.ScaledObjectRef(name="scaled", namespace="loanmesh", scalerMetadata={"service": service, **more})


async def replicas(servicer: ScalerServicer, service: str) -> float:
    answer = await servicer.GetMetrics(pb.GetMetricsRequest(scaledObjectRef=asked(service), metricName=METRIC), None)
    (value,) = answer.metricValues
    assert value.metricValue == math.ceil(value.metricValueFloat)
    return value.metricValueFloat


async def test_each_service_is_told_by_what_it_does() -> None:
    servicer = served(Mesh(backlog=6000, arrived=int(100 * WINDOW_S)), FakeClock())
    found = {name: await replicas(servicer, name) for name in SETTINGS.rates}
    assert found == pytest.approx({"intake": 0.2, "intake-worker": 2, "bureau": 4, "scoring": 0.5, "pricing": 1})


async def test_the_target_is_one_replica_a_replica() -> None:
    spec = await served(Mesh(), FakeClock()).GetMetricSpec(asked(), None)
    assert [(s.metricName, s.targetSize, s.targetSizeFloat) for s in spec.metricSpecs] == [(METRIC, 1, 1.0)]


async def test_replicas_that_are_half_as_fast_today_are_wanted_twice() -> None:
    clock, mesh = FakeClock(), Mesh(backlog=6000)
    estimate = Estimate(mesh.backlog, clock)
    for _ in range(100):
        clock.advance(0.1)
        estimate.decided(5, busy=True)  # 50 a second, where 100 were measured.
    servicer = served(mesh, clock, estimate)
    assert await replicas(servicer, "pricing") == pytest.approx(1.0, rel=0.05)
    mesh.came = int(500 * WINDOW_S)
    clock.advance(1.1)
    assert await replicas(servicer, "intake") == pytest.approx(1.0), "who accepts is no slower for it"


async def test_replicas_that_have_little_to_do_are_not_taken_for_slow_ones() -> None:
    clock, mesh = FakeClock(), Mesh(backlog=20, arrived=int(10 * WINDOW_S))
    estimate = Estimate(mesh.backlog, clock)
    for _ in range(100):
        clock.advance(0.1)
        estimate.decided(1, busy=True)  # Ten a second, because no more come.
    assert await replicas(served(mesh, clock, estimate), "pricing") == pytest.approx(10 / 0.5 / 200)


async def test_all_who_ask_within_a_second_share_one_count() -> None:
    clock, mesh = FakeClock(), Mesh(backlog=10, arrived=10)
    servicer = served(mesh, clock)
    await asyncio.gather(*(replicas(servicer, name) for name in [*SETTINGS.rates] * 5))
    assert len(mesh.counted) == 1
    clock.advance(1.1)
    await replicas(servicer, "bureau")
    assert len(mesh.counted) == 2
    assert mesh.counted[1] == clock.now().timestamp() - WINDOW_S


async def test_more_arrivals_than_are_counted_are_taken_for_as_many() -> None:
    servicer = served(Mesh(arrived=10 * COUNT_MAX), FakeClock())
    assert await replicas(servicer, "intake") == pytest.approx(COUNT_MAX / WINDOW_S / 0.5 / 1000)


async def test_a_store_that_does_not_answer_is_no_zero() -> None:
    """A zero would scale down in the middle of an outage; an error leaves what there is."""
    mesh = Mesh(backlog=6000)
    mesh.down = True
    servicer = served(mesh, FakeClock())
    with pytest.raises(DependencyDown):
        await replicas(servicer, "bureau")
    with pytest.raises(DependencyDown):
        await servicer.IsActive(asked(), None)


async def test_another_metric_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="metricName: is 'cpu'; there is only loanmesh-wanted-replicas"):
        await served(Mesh(), FakeClock()).GetMetrics(
            pb.GetMetricsRequest(scaledObjectRef=asked(), metricName="cpu"), None
        )


@pytest.mark.parametrize(("mesh", "active"), [(Mesh(), False), (Mesh(backlog=1), True), (Mesh(arrived=1), True)])
async def test_there_is_something_to_do_while_anything_waits_or_comes(mesh: Mesh, active: bool) -> None:
    assert (await served(mesh, FakeClock()).IsActive(asked(), None)).result is active


# --- Streams ---


async def all_of(stream: AsyncIterator[Any]) -> list[Any]:
    return [said async for said in stream]


async def test_a_stream_speaks_at_once_and_at_changes_and_ends_by_itself() -> None:
    clock, mesh = FakeClock(), Mesh()
    stream = served(mesh, clock).StreamIsActive(asked(), None)
    assert (await anext(stream)).result is False
    mesh.came = 5
    assert (await anext(stream)).result is True
    assert await all_of(stream) == []
    assert STREAM_S <= clock.monotonic() <= STREAM_S + LOOK_S


async def test_the_spec_is_streamed_once_at_once() -> None:
    clock = FakeClock()
    servicer = served(Mesh(), clock)
    assert await all_of(servicer.StreamMetricSpec(asked(), None)) == [await servicer.GetMetricSpec(asked(), None)]
    assert clock.monotonic() >= STREAM_S


async def test_streams_are_bounded_and_one_that_ends_makes_room() -> None:
    servicer = served(Mesh(), FakeClock())
    one, other = servicer.StreamIsActive(asked(), None), servicer.StreamMetricSpec(asked(), None)
    await anext(one)
    await anext(other)
    with pytest.raises(Overloaded, match="2 streams are open already"):
        await anext(servicer.StreamIsActive(asked(), None))
    await one.aclose()  # type: ignore[attr-defined]  # Ours are generators; the contract says only iterators.
    await anext(servicer.StreamIsActive(asked(), None))


async def test_a_replica_that_leaves_ends_its_streams() -> None:
    clock = FakeClock()
    servicer = served(Mesh(), clock)
    stream = servicer.StreamIsActive(asked(), None)
    await anext(stream)
    servicer.leave()
    assert await all_of(stream) == []
    assert clock.monotonic() <= LOOK_S


async def test_a_stream_of_a_wrong_trigger_is_refused_before_it_begins() -> None:
    with pytest.raises(InvalidRequest):
        await anext(served(Mesh(), FakeClock()).StreamIsActive(asked("bureaus"), None))
