"""Rival (d): the four steps as a Temporal workflow. Runs in the rivals' own environment, against a server on loopback.

    python temporal_workflow.py ADDRESS COUNT IN_FLIGHT local|remote NAME

Prints `ready`, waits for a line on stdin, decides COUNT, prints how long that took and the CPU it used. The activities
are empty, which is generous to it. `local` runs them inside the workflow's own task, the cheapest way it has.
"""

import asyncio
import datetime as dt
import json
import sys
import time

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

TIMEOUT = dt.timedelta(seconds=30)


@activity.defn
async def gather(number: int) -> int:
    """Where bureau would be asked."""
    return number


@activity.defn
async def score(number: int) -> int:
    """Where scoring would be asked."""
    return number


@activity.defn
async def price(number: int) -> int:
    """Where pricing would be asked."""
    return number


@activity.defn
async def commit(number: int) -> int:
    """Where the decision would be stored."""
    return number


STEPS = (gather, score, price, commit)


@workflow.defn
class Local:
    """One application, its steps inside the workflow's task."""

    @workflow.run
    async def run(self, number: int) -> int:
        """Four steps."""
        for step in STEPS:
            number = await workflow.execute_local_activity(step, number, start_to_close_timeout=TIMEOUT)
        return number


@workflow.defn
class Remote:
    """One application, each step a task of its own."""

    @workflow.run
    async def run(self, number: int) -> int:
        """Four steps."""
        for step in STEPS:
            number = await workflow.execute_activity(step, number, start_to_close_timeout=TIMEOUT)
        return number


async def main() -> None:
    """Set up worker and client, and run."""
    address, count, in_flight, way, name = sys.argv[1:6]
    client = await Client.connect(address)
    decide = Local if way == "local" else Remote
    worker = Worker(
        client,
        task_queue=name,
        workflows=[decide],
        activities=STEPS,
        # Its sandbox replays imports for each workflow: safe, and dear. Ours has none, so it need not pay for one.
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_concurrent_workflow_tasks=200,
        max_concurrent_activities=200,
        max_concurrent_local_activities=200,
    )
    async with worker:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        numbers = iter(range(int(count)))

        async def one() -> None:
            for number in numbers:
                answer = await client.execute_workflow(decide.run, number, id=f"{name}-{number}", task_queue=name)
                assert answer == number

        started, used = time.monotonic(), time.process_time()
        await asyncio.gather(*(one() for _ in range(int(in_flight))))
        seconds, cpu_s = time.monotonic() - started, time.process_time() - used
    print(json.dumps({"count": int(count), "seconds": seconds, "cpu_s": cpu_s}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
