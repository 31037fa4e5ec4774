"""`make bench`: decided applications a second and server CPU for each, beside a bare chain of four empty services.

Both run in the same minute on the same machine, one call an application, the generator beside them on the same cores;
the rounds take turns. Cold: every application is about a subject that bureau has not seen, five source calls each; the
sandbox that plays the sources is counted apart. Warm: about subjects whose evidence is in bureau's cache.
Writes build/bench.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from lending.intake.v1.intake_service_pb2 import Application
from rich.console import Console

from benchmarks.hop import METHOD
from lab.population import Population
from loanmesh.cli import show
from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.clock import SystemClock

IN_FLIGHT, APPLICATIONS, CALLS, ROUNDS, ALONE = 64, 1000, 2000, 3, 100
SERVICES = ("intake", "bureau", "scoring", "pricing")
CLOCK = SystemClock()


def cpu_s(pid: int) -> float:
    """CPU that a process has used so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(count: int, in_flight: int, one: Callable[[int], Awaitable[object]]) -> tuple[float, list[float]]:
    """Run `one` for 0 to count - 1, so many at once: (seconds in all, seconds of each)."""
    numbers = iter(range(count))
    took: list[float] = []

    async def worker() -> None:
        for number in numbers:
            started = CLOCK.monotonic()
            await one(number)
            took.append(CLOCK.monotonic() - started)

    started = CLOCK.monotonic()
    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return CLOCK.monotonic() - started, took


async def measure(
    pids: dict[str, int], count: int, in_flight: int, one: Callable[[int], Awaitable[object]]
) -> dict[str, Any]:
    """Rate, median latency and CPU an item by process."""
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    seconds, took = await load(count, in_flight, one)
    used = {name: (cpu_s(pid) - before[name]) / count * 1000 for name, pid in pids.items()}
    return {"a_second": count / seconds, "p50_ms": sorted(took)[count // 2] * 1000, "cpu_ms": used}


async def bare_chain() -> tuple[list[asyncio.subprocess.Process], str]:
    """Start four hops, the last one first."""
    address, processes = "", []
    for _ in range(4):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.hop", *([address] if address else []), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout
        address = f"127.0.0.1:{(await process.stdout.readline()).decode().strip()}"
        processes.append(process)
    return processes, address


async def main() -> None:
    """Measure, print, write."""
    console = Console(highlight=False)
    population = Population()
    hops, address = await bare_chain()
    rounds: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("bare", "cold", "warm", "bare alone", "warm alone")
    }
    with tempfile.TemporaryDirectory() as folder:
        mesh = Mesh(Path(folder), None, free_ports(), CLOCK, console.print)
        try:
            await mesh.start()
            ours = {name: mesh.parts[name].process.pid for name in SERVICES}  # type: ignore[union-attr]
            chain = {f"hop {i}": process.pid for i, process in enumerate(hops)}
            channel = grpc.aio.insecure_channel(address)
            ask = channel.unary_unary(METHOD, Empty.SerializeToString, Empty.FromString)
            async with Client(mesh.parts["intake"].address) as client:

                async def decide(index: int) -> None:
                    application = prepared[index % len(prepared)]
                    answer = await client.submit(application, wait_s=20)
                    assert answer.HasField("decision"), answer.waiting_for

                async def call(_: int) -> None:
                    await ask(Empty())

                for number in range(ROUNDS):
                    first = number * APPLICATIONS
                    prepared = [
                        json_format.ParseDict(population.application("person", i, CLOCK.now()), Application())
                        for i in range(first, first + APPLICATIONS)
                    ]
                    rounds["bare"].append(await measure(chain, CALLS, IN_FLIGHT, call))
                    rounds["cold"].append(await measure(ours, APPLICATIONS, IN_FLIGHT, decide))
                    rounds["warm"].append(await measure(ours, APPLICATIONS, IN_FLIGHT, decide))
                    rounds["bare alone"].append(await measure(chain, ALONE, 1, call))
                    rounds["warm alone"].append(await measure(ours, ALONE, 1, decide))
                    console.print(f"round {number + 1} of {ROUNDS} done")
            await channel.close()
        finally:
            await mesh.stop()
            for process in hops:
                process.terminate()
            await asyncio.gather(*(process.wait() for process in hops))
    report(console, {name: middle(found) for name, found in rounds.items()})


def middle(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median rate."""
    return sorted(found, key=lambda one: one["a_second"])[len(found) // 2]


def report(console: Console, found: dict[str, dict[str, Any]]) -> None:
    """Print the table and the ratios; write build/bench.json."""
    table = [
        (name, f"{one['a_second']:.0f}", f"{one['p50_ms']:.1f}", f"{sum(one['cpu_ms'].values()):.2f}",
         ", ".join(f"{part} {ms:.2f}" for part, ms in one["cpu_ms"].items()))
        for name, one in found.items()
    ]  # fmt: skip
    title = (
        f"{IN_FLIGHT} in flight, or one alone; median of {ROUNDS} rounds; {platform.machine()}, {os.cpu_count()} cores"
    )
    console.print(show.table(title, ("", "a second", "p50 ms", "server CPU ms each", "of which"), table))
    cpu = {name: sum(one["cpu_ms"].values()) for name, one in found.items()}
    rows = [
        ("decided warm a second / bare chain's calls a second", found["warm"]["a_second"] / found["bare"]["a_second"]),
        ("decided cold a second / bare chain's calls a second", found["cold"]["a_second"] / found["bare"]["a_second"]),
        ("server CPU a decided application, warm / bare chain's", cpu["warm"] / cpu["bare"]),
        ("server CPU a decided application, cold / bare chain's", cpu["cold"] / cpu["bare"]),
        (
            "p50 alone, decision included, warm / bare chain's",
            found["warm alone"]["p50_ms"] / found["bare alone"]["p50_ms"],
        ),
    ]
    console.print(show.table("ratios", ("", ""), [(name, f"{value:.2f}") for name, value in rows]))
    written = [
        {"name": name, "value": round(value, 3), "unit": "ratio", "target": None, "met": None} for name, value in rows
    ]
    Path("build").mkdir(exist_ok=True)
    Path("build/bench.json").write_text(
        json.dumps({"rows": written, "measured": found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    asyncio.run(main())
