"""Where the CPU goes: the functions of each service's event loop that used most, while it decides warm applications."""

from __future__ import annotations

import pstats
import tempfile
from pathlib import Path

from benchmarks import ours
from benchmarks.bench import Bench, Found, figure, table
from benchmarks.core import IN_FLIGHT
from benchmarks.load import closed_loop, metered
from lab.population import Population
from loanmesh.client import Client
from loanmesh.runtime.profile import VARIABLE

TOP = 10


async def measure(bench: Bench) -> Found:
    """One mesh a way of submitting; its services write their profiles when they leave."""
    ways = ("one by one", "by submit_many")
    markdown, measured = [], {}
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            shares, count = await _decide(bench, way, folder)
            functions = {service: _functions(Path(folder), service) for service in ours.SERVICES}
        rows = [
            (service, f"{share:.0%}", name, figure(own_s / count * 1e6), figure(calls / count))
            for service, found in functions.items()
            for (name, own_s, calls), share in zip(found[:TOP], _shares(found), strict=False)
        ]
        markdown += [f"Warm, {way}: {shares}.", table(("service", "share", "function", "us each", "calls each"), rows)]
        measured[way] = {"count": count, "functions": {name: found[:40] for name, found in functions.items()}}
    return Found(rows=[], markdown=markdown, measured=measured)


async def _decide(bench: Bench, way: str, folder: str) -> tuple[str, int]:
    count, clock = bench.size(2000, 60), bench.clock
    async with (
        ours.our_mesh(bench, **{VARIABLE: folder}) as mesh,
        Client(mesh.parts["intake"].address) as client,
    ):
        prepared = ours.prepare(Population(bench.seed), 0, min(count, 200), clock)
        await ours.decide_many(client, prepared, clock)  # Fills bureau's cache.
        many = (prepared * (count // len(prepared)))[:count]
        if way == "one by one":
            found = await closed_loop(
                ours.pids(mesh), len(many), IN_FLIGHT, lambda index: ours.decide(client, many[index]), clock
            )
        else:
            with metered(ours.pids(mesh), len(many), clock) as found:
                await ours.decide_many(client, many, clock)
    loops = ", ".join(
        f"{name} {found.loop_cpu_ms[name] / ms:.0%} of {figure(ms)} ms" for name, ms in found.cpu_ms.items() if ms
    )
    return f"share of a service's CPU that its event loop uses (profiler on): {loops}", len(many) + len(prepared)


def _functions(folder: Path, service: str) -> list[tuple[str, float, int]]:
    """Functions with the CPU they used themselves, seconds, and how often they were called; dearest first."""
    (file,) = folder.glob(f"{service}-*.prof")
    read: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(str(file)).stats  # type: ignore[attr-defined]  # Typeshed leaves the one attribute out that everybody reads.
    found = [(_name(*where), own_s, calls) for where, (_, calls, own_s, _, _) in read.items()]
    return sorted(found, key=lambda one: -one[1])


def _name(file: str, line: int, function: str) -> str:
    """`package/module.py:function`, or the name of what is written in C."""
    if file == "~":
        return function.strip("<>").removeprefix("built-in method ").removeprefix("method ")
    parts = Path(file).parts
    inside = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:]
    return f"{'/'.join(inside[-3:])}:{function}"


def _shares(found: list[tuple[str, float, int]]) -> list[float]:
    whole = sum(own_s for _, own_s, _ in found)
    return [own_s / whole for _, own_s, _ in found]
