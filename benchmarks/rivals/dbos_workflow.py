"""Rival (c): the four steps as a durable workflow in DBOS. Runs in the rivals' own environment.

    python dbos_workflow.py DATABASE_URL COUNT IN_FLIGHT start|queue NAME

Prints `ready`, waits for a line on stdin, decides COUNT, prints how long that took and the CPU it used. The steps are
empty: what is measured is the engine alone, which is generous to it, as ours does the real work in the same time.
"""

import asyncio
import json
import sqlite3
import sys
import time

from dbos import DBOS

POLL_S = 0.02


@DBOS.step()
async def gather(number: int) -> int:
    """Where bureau would be asked."""
    return number


@DBOS.step()
async def score(number: int) -> int:
    """Where scoring would be asked."""
    return number


@DBOS.step()
async def price(number: int) -> int:
    """Where pricing would be asked."""
    return number


@DBOS.step()
async def commit(number: int) -> int:
    """Where the decision would be stored."""
    return number


@DBOS.workflow()
async def decide(number: int) -> int:
    """One application."""
    return await commit(await price(await score(await gather(number))))


async def run(count: int, in_flight: int, way: str) -> None:
    """Decide, so many at once."""
    DBOS.launch()
    queue = None
    if way == "queue":
        queue = await DBOS.register_queue_async("rival", worker_concurrency=in_flight, polling_interval_sec=POLL_S)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            if queue:
                handle = await queue.enqueue_async(decide, number)
                assert await handle.get_result(polling_interval_sec=POLL_S) == number
            else:
                handle = await DBOS.start_workflow_async(decide, number)
                assert await handle.get_result() == number

    started, used = time.monotonic(), time.process_time()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    seconds, cpu_s = time.monotonic() - started, time.process_time() - used
    print(json.dumps({"count": count, "seconds": seconds, "cpu_s": cpu_s}), flush=True)


def main() -> None:
    """Set up the engine at its sensible best, and run."""
    url, count, in_flight, way, name = sys.argv[1:6]
    if url.startswith("sqlite"):
        # It leaves SQLite's rollback journal on; the write-ahead log is remembered in the file and costs it less.
        with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    config = {
        "name": "rival",
        "system_database_url": url,
        "log_level": "ERROR",
        "executor_id": name,
        "sys_db_pool_size": 20,
    }
    DBOS(config=config)
    asyncio.run(run(int(count), int(in_flight), way))
    DBOS.destroy()


if __name__ == "__main__":
    main()
