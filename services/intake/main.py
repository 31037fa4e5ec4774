"""Intake's process: settings, parts, serve. The only place where it is put together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from externalscaler.externalscaler_pb2_grpc import add_ExternalScalerServicer_to_server
from lending.intake.v1.erasure_service_pb2_grpc import add_ErasureServiceServicer_to_server
from lending.intake.v1.intake_service_pb2_grpc import add_IntakeServiceServicer_to_server
from lending.intake.v1.parking_service_pb2_grpc import add_ParkingServiceServicer_to_server

from loanmesh.runtime import measures, telemetry
from loanmesh.runtime.breaker import State
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.clock import Clock, new_uuid7
from loanmesh.runtime.database import open_database
from loanmesh.runtime.degradation import Step
from loanmesh.runtime.demand import Demand
from loanmesh.runtime.guard import Guard, make_guard
from loanmesh.runtime.keys import Keys
from loanmesh.runtime.migrations import prepare
from loanmesh.runtime.opening import opening
from loanmesh.runtime.sealed import Sealer
from loanmesh.runtime.server import Service, run
from loanmesh.runtime.tracing import current_traceparent, recorder
from loanmesh.runtime.vitals import Queue, Resting, Standing, Vitals
from loanmesh.runtime.witness import WitnessedClock
from services.intake.admission import Admission
from services.intake.application import Claim
from services.intake.arrival import Arrivals
from services.intake.dictionary import labels, sources
from services.intake.erasure import Eraser, Upkeep
from services.intake.erasure_servicer import SERVICE_NAME as ERASURE
from services.intake.erasure_servicer import ErasureServicer
from services.intake.estimate import Estimate
from services.intake.following import Following
from services.intake.keeping import Keeping
from services.intake.mesh import GrpcBureau, GrpcPricing, GrpcScoring, deadline_s
from services.intake.parking import Parking
from services.intake.parking_servicer import SERVICE_NAME as PARKING
from services.intake.parking_servicer import ParkingServicer
from services.intake.pipeline import Pipeline
from services.intake.ports import Decided, Deferred, Result
from services.intake.privacy import Privacy
from services.intake.quota import Allowance, Quota
from services.intake.reception import Reception
from services.intake.replay import Replay
from services.intake.scaler import Scaler
from services.intake.scaler_servicer import ScalerServicer
from services.intake.servicer import IntakeServicer
from services.intake.settings import IntakeSettings
from services.intake.store import Store
from services.intake.tally import tally
from services.intake.watch import Watch
from services.intake.worker import Worker

BUSY_SHARE = 0.6
"""From this share of its time on, at work or waiting for a core, the event loop is what callers queue for."""


def batches_allowed(guards: Sequence[Guard]) -> int | None:
    """How many batches make sense side by side: none while a service is known to be down, one while it is tried."""
    if any(guard.breaker.refuses and guard.breaker.state is not State.HALF_OPEN for guard in guards):
        return 0
    well = (State.CLOSED, State.FORCED_CLOSED)
    return None if all(guard.breaker.state in well for guard in guards) else 1


async def build(settings: IntakeSettings, clock: Clock) -> Service:
    """Put intake together and start its worker."""
    keys = Keys.open("INTAKE_PRIVACY__KEYS_FILE", Path(settings.privacy.keys_file), clock)
    privacy = Privacy(Sealer(keys), seals=settings.privacy.seal_new)
    url = settings.database_url.get_secret_value()
    with opening("INTAKE_DATABASE_URL", url):
        await asyncio.to_thread(prepare, url, "services.intake", settings.migrate)
        database = await open_database(url)
    owner = telemetry.instance("intake")
    report = structlog.get_logger().warning
    witnessed = WitnessedClock(
        clock, lambda: store.now(), lambda ahead_s: report("clock_not_believed", ahead_s=round(ahead_s, 3))
    )
    spans = recorder()
    following = spans and Following(
        spans,
        witnessed,
        owner,
        settings.telemetry.slow_s,
        settings.lease.duration_s,
        structlog.get_logger().warning,
    )
    put_aside = following.put_aside if following else lambda _: None
    store = Store(database, witnessed, owner, settings.lease.duration_s, privacy, put_aside)
    with opening("INTAKE_DATABASE_URL", url):
        await witnessed.look()
    clock = witnessed
    channels = [
        open_channel(target, clock, deadline_s, service=name, tls=settings.tls)
        for name, target in (
            ("bureau", settings.bureau),
            ("scoring", settings.scoring),
            ("pricing", settings.pricing),
        )
    ]
    guards = [
        make_guard(name, "service", settings.downstream.breaker, settings.downstream.bulkhead, clock, random.Random())
        for name in ("bureau", "scoring", "pricing")
    ]
    scoring, pricing = GrpcScoring(channels[1], guards[1]), GrpcPricing(channels[2], guards[2])
    watch = Watch(store.revisions, clock, settings.lease.poll_s, structlog.get_logger().warning)
    estimate = Estimate(store.backlog, clock, None if settings.work.decides else store.decided)
    arrivals, demand = Arrivals(), Demand(clock)
    quota = Quota(
        settings.quota.a_second,
        settings.quota.burst,
        {name: Allowance(one.a_second, one.burst) for name, one in settings.quota.clients.items()},
    )
    admission = Admission(settings.work.queue_s_max, arrivals, quota, clock, lambda: demand.share() > BUSY_SHARE)

    def told(step: Step, in_force: bool) -> None:
        report("stage_is_down" if in_force else "stage_is_up", stage=step.subject, cause=step.cause)

    async def look() -> Standing:
        resting = tuple(Resting(*one) for one in await store.resting())
        return Standing(*await store.standing(settings.lease.poll_s), resting)

    parking = Parking(settings.parking, clock, random.Random(), told)
    vitals = Vitals(
        guards=guards, count_backlog=estimate.backlog, steps=[*parking.steps.values(), witnessed.step], look=look
    )
    decision_s = telemetry.recorder(measures.DECISION)
    quotient = telemetry.recorder(measures.ESTIMATE)

    def settled(results: Mapping[str, Result]) -> None:
        estimate.decided(sum(not isinstance(result, Deferred) for result in results.values()), worker.busy)
        watch.settled(results)
        tally(vitals, results.values(), decision_s)
        for key, result in results.items():
            if isinstance(result, Decided) and (came_true := estimate.came_true(key)) is not None:
                quotient(came_true, {})

    bureau = GrpcBureau(channels[0], guards[0])
    pipeline = Pipeline(
        following.bureau(bureau) if following else bureau,
        following.scoring(scoring) if following else scoring,
        following.pricing(pricing) if following else pricing,
        following.store(store) if following else store,
        clock,
        random.Random(),
        settings.due.information_days,
        parking,
        report,
        sources(),
    )

    async def decide(claims: Sequence[Claim]) -> Mapping[str, Result]:
        return await (following.decide(claims, pipeline.decide_batch) if following else pipeline.decide_batch(claims))

    worker = Worker(
        store,
        decide,
        clock,
        batch_max=settings.work.batch_max,
        batches=settings.work.batches_in_flight,
        held_max=settings.work.held_max if settings.work.decides else 0,
        lease_s=settings.lease.duration_s,
        poll_s=settings.lease.poll_s,
        settled=settled,
        pressed=lambda: arrivals.pressed(clock.monotonic()),
        crowded=admission.crowded,
        may_begin=lambda: batches_allowed(guards),
        report=report,
    )
    servicer = IntakeServicer(
        store,
        worker,
        watch,
        estimate,
        pricing.schedules,
        Replay(scoring, pricing),
        labels(),
        clock,
        lambda: new_uuid7(clock),
        settings.work.accepts_waiting_max,
        admission,
        current_traceparent,
        Reception(vitals, telemetry.recorder(measures.ACKNOWLEDGEMENT)),
        settings.work.watches_max,
        stored=following.stored if following else lambda *_: None,
    )
    scaler = Scaler(estimate, store.arrived, settings.scaler, clock)
    scaler_servicer = ScalerServicer(scaler, clock, settings.scaler.streams_max)
    vitals.queues.append(Queue("work", lambda: worker.waiting, settings.work.held_max))
    if settings.work.decides:
        worker.start()
    watch.start()
    keeping = Keeping(database, clock, owner, privacy)
    told_of_passes = structlog.get_logger().info
    upkeep = Upkeep(keeping, settings.retention, privacy.goal, clock, settings.privacy.pass_rows, told_of_passes)
    eraser = Eraser(keeping, bureau, settings.retention, clock)
    looking = [
        asyncio.create_task(witnessed.look_forever()),
        asyncio.create_task(keys.look_forever()),
        asyncio.create_task(upkeep.keep_forever(settings.privacy.pass_every_s)),
    ]

    async def drain() -> None:
        scaler_servicer.leave()
        await worker.drain()
        watch.leave()

    async def close() -> None:
        for task in looking:
            task.cancel()
        await asyncio.wait(looking)
        await watch.stop()
        await asyncio.gather(*(channel.close() for channel in channels))
        await database.close()

    return Service(
        [
            (add_IntakeServiceServicer_to_server, servicer),
            (add_ExternalScalerServicer_to_server, scaler_servicer),
            (add_ParkingServiceServicer_to_server, ParkingServicer(store, watch.changed)),
            (add_ErasureServiceServicer_to_server, ErasureServicer(eraser)),
        ],
        ["lending.intake.v1.IntakeService", PARKING, ERASURE, "externalscaler.ExternalScaler"],
        close=close,
        drain=drain,
        vitals=vitals,
    )


def main() -> None:
    """Run intake until SIGTERM."""
    run("intake", IntakeSettings, build)


if __name__ == "__main__":
    main()
