"""The same arrivals as lab.traffic plays, sent by plain clients: a deadline a try, and tries with a growing wait.

    python -m benchmarks.naive.traffic ADDRESS [as lab.traffic] [--tries 3]

A try may take the caller's whole deadline. Tries follow at once with a jittered wait of 0.1 s, then 0.2 s, on
UNAVAILABLE, RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED: what retry libraries do when told nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import grpc
import uvloop
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from lab.population import Population
from lab.traffic import OK, Answer, Arrival, Record, Send, begin, due, options, play, prepare, publish
from loanmesh.runtime.clock import Clock, SystemClock, new_request_id

if TYPE_CHECKING:  # A name that only type stubs have.
    from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceAsyncStub

_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED})


def plain_sender(
    stubs: Sequence[IntakeServiceAsyncStub],
    prepared: Mapping[str, Sequence[pb.Application]],
    clock: Clock,
    deadline_s: float,
    tries: int,
) -> Send:
    """Sends through one stub after another."""

    async def send(number: int, arrival: Arrival) -> Answer:
        applications = prepared[arrival.kind]
        request = pb.SubmitApplicationRequest(
            parent="lenders/demo",
            request_id=new_request_id(),
            application=applications[number % len(applications)],
        )
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(lambda e: isinstance(e, grpc.aio.AioRpcError) and e.code() in _AGAIN),
                stop=stop_after_attempt(tries),
                wait=wait_exponential_jitter(initial=0.1, jitter=0.1),
                sleep=clock.sleep,
                reraise=True,
            ):
                with attempt:
                    answer = await stubs[number % len(stubs)].SubmitApplication(request, timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            return Answer(error.code().name)
        return Answer(OK, answer.application.name)

    return send


async def run(asked: argparse.Namespace, clock: Clock) -> list[Record]:
    """Make the applications, connect the clients, play the arrivals."""
    arriving = due(asked)
    prepared = prepare(asked, Population(), clock)
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(asked.address)) for _ in range(asked.clients)
        ]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        send = plain_sender(
            [IntakeServiceStub(channel) for channel in channels], prepared, clock, asked.deadline_s, asked.tries
        )
        await begin(asked, clock)
        return await play(arriving, send, clock, asked.in_flight_max)


def main() -> None:
    """Run from the command line."""
    parser = options(__doc__ or "")
    parser.add_argument("--tries", type=int, default=3)
    asked = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        publish(runner.run(run(asked, SystemClock())), asked)


if __name__ == "__main__":
    main()
