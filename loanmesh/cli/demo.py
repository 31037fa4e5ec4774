"""`loanmesh demo`: the main job in a minute: decide, explain, lose a source, get it back."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import aiohttp
from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb
from rich.console import Console

from lab.population import Kind, Population
from loanmesh.cli import show
from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client
from loanmesh.runtime.clock import Clock

PERSONS, FIRMS, DURING_OUTAGE = 120, 80, 40


async def demo(console: Console, state: Path, clock: Clock) -> dict[str, object]:
    """Run it on a mesh of its own; answers the figures it printed."""
    mesh = Mesh(state, None, free_ports(), clock, lambda line: console.print(f"[dim]{line}[/]"))
    console.print("[bold]Starting[/] intake, bureau, scoring, pricing and a sandbox of five sources ...")
    started = clock.monotonic()
    try:
        await mesh.start()
        start_s = clock.monotonic() - started
        console.print(f"ready in {start_s:.1f} s\n")
        async with Client(mesh.parts["intake"].address) as client:
            figures = await _decide(console, client, clock)
            figures |= await _lose_a_source(console, client, mesh.parts["sandbox"].address, clock)
        return {"start_s": round(start_s, 2), **figures}
    finally:
        await mesh.stop()
        console.print("stopped; nothing is left running")


async def _decide(console: Console, client: Client, clock: Clock) -> dict[str, object]:
    population = Population()
    started = clock.monotonic()
    jobs: list[tuple[Kind, int]] = [("person", i) for i in range(PERSONS)]
    jobs += [("firm", i) for i in range(FIRMS)]
    answers = await asyncio.gather(*(_submit(client, population, kind, i, clock, 20.0) for kind, i in jobs))
    took_s = clock.monotonic() - started
    mix = Counter((kind, show.state_of(a)) for (kind, _), a in zip(jobs, answers, strict=True))
    outcomes = ("APPROVED", "COUNTER_OFFER", "DECLINED", "PENDING")
    rows = [(kind, *(mix[(kind, outcome)] for outcome in outcomes)) for kind in ("person", "firm")]
    console.print(show.table(f"{len(jobs)} applications decided in {took_s:.1f} s", ("", *outcomes), rows))
    for outcome in outcomes[:3]:
        one = next((a for a in answers if show.state_of(a) == outcome), None)
        if one:
            console.print(f"\n[{show.COLOURS[outcome]} bold]One {outcome.replace('_', ' ').lower()}[/]")
            show.application(console, one)
            show.explanation(console, await client.explain(one.name), every=False)
    return {"decided": len(jobs), "decide_s": round(took_s, 2), "mix": {f"{k}:{o}": n for (k, o), n in mix.items()}}


async def _lose_a_source(console: Console, client: Client, sandbox: str, clock: Clock) -> dict[str, object]:
    console.print("\n[bold]Now court and tax are dead.[/] Applications come in all the same:")
    population = Population()
    await _fault(sandbox, "court", dead=True)
    await _fault(sandbox, "tax", dead=True)
    first = 1000
    answers = await asyncio.gather(
        *(_submit(client, population, "firm", first + i, clock, 1.5) for i in range(DURING_OUTAGE))
    )
    during = Counter(show.state_of(a) for a in answers)
    console.print(f"  {dict(during)}: none failed, none was declined for it")
    show.application(console, answers[0])
    console.print("\n[bold]They come back.[/] Nobody does anything:")
    await _fault(sandbox, "*", dead=False)
    started = clock.monotonic()
    after = Counter([await _until_decided(client, a.name) for a in answers])
    took_s = clock.monotonic() - started
    console.print(f"  {dict(after)}, {took_s:.1f} s after the sources returned\n")
    return {"during_outage": dict(during), "after_outage": dict(after), "recover_s": round(took_s, 2)}


async def _submit(
    client: Client, population: Population, kind: Kind, index: int, clock: Clock, wait_s: float
) -> pb.Application:
    application = json_format.ParseDict(population.application(kind, index, clock.now()), pb.Application())
    return await client.submit(application, wait_s=wait_s)


async def _until_decided(client: Client, name: str) -> str:
    last = "PENDING"
    async for application in client.watch(name):
        last = show.state_of(application)
    return last


async def _fault(sandbox: str, source: str, **fault: bool) -> None:
    url = f"http://{sandbox}/control/faults"
    async with aiohttp.ClientSession() as session, session.post(url, json={"source": source, **fault}) as answer:
        answer.raise_for_status()
