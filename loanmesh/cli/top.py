"""`loanmesh top`: the mesh as it works: rates, errors, latency, backlog, breakers, replicas."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from loanmesh.cli import connection
from loanmesh.cli.folder import State, chosen
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.seeing.rates import Look, Picture, Row, picture

UNREACHABLE, INTERRUPTED = 3, 130
CALL_S = 2.0
"""How long a process may take to answer before it counts as away."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(top)


def top(
    state: State = Path(),
    address: Annotated[
        list[str] | None, typer.Option(help="A process, HOST:PORT; repeatable. Else all of the mesh that `up` runs.")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=60)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture, then end; so too where output is piped.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One picture as JSON for machines.")] = False,
) -> None:
    """Show the mesh as it works, refreshed each second: what comes in, what is decided, errors, latency, breakers.

    Example: `loanmesh top --once`
    """
    folder = chosen(state)
    clock = SystemClock()
    try:
        if json_ or once or not sys.stdout.isatty():
            shown = asyncio.run(_one(folder, address or [], every, clock))
            if json_:
                print(json.dumps(asdict(shown), ensure_ascii=False))
            else:
                Console(highlight=False).print(draw(shown))
        else:
            shown = asyncio.run(_live(folder, address or [], every, clock))
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    if all(row.state == "away" for row in shown.rows):
        complain = Console(stderr=True, highlight=False)
        complain.print("[red]not reachable[/]: is the mesh up? `loanmesh up` starts one, --state or --address names it")
        raise typer.Exit(UNREACHABLE)


async def _one(state: Path, addresses: Sequence[str], every_s: float, clock: Clock) -> Picture:
    before = await look(state, addresses, clock)
    await clock.sleep(every_s)
    return picture(before, await look(state, addresses, clock))


async def _live(state: Path, addresses: Sequence[str], every_s: float, clock: Clock) -> Picture:
    before = await look(state, addresses, clock)
    shown = picture(before, before)
    with Live(draw(shown), auto_refresh=False, screen=False) as live:
        while any(row.state != "away" for row in shown.rows):
            await clock.sleep(every_s)
            after = await look(state, addresses, clock)
            shown, before = picture(before, after), after
            live.update(draw(shown), refresh=True)
    return shown


async def look(state: Path, addresses: Sequence[str], clock: Clock) -> dict[str, Look]:
    """All processes at once, by address: those named, else those that `up` says it runs, else the usual ones."""
    from loanmesh.cli import processes

    asked = list(addresses) or await processes.replicas(state)
    found = await asyncio.gather(*(_look(one, clock) for one in asked))
    return dict(zip(asked, found, strict=True))


async def _look(address: str, clock: Clock) -> Look:
    import grpc
    from lending.ops.v1 import ops_service_pb2 as pb
    from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub

    try:
        async with connection.channel(address) as channel:
            stub = OpsServiceStub(channel)
            status = await stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_S)
            listed = await stub.ListDependencies(pb.ListDependenciesRequest(), timeout=CALL_S)
            return Look(clock.monotonic(), status, listed.dependencies)
    except (grpc.aio.AioRpcError, OSError):
        return Look(clock.monotonic(), None)


def draw(shown: Picture) -> Group:
    """For a person."""
    from loanmesh.cli.show import table

    backlog = "?" if shown.backlog is None else f"{shown.backlog:,}"
    head = Text.assemble(
        ("in ", "bold"), f"{shown.accepted:,.1f}/s   ", ("decided ", "bold"), f"{shown.decided:,.1f}/s   ",
        ("backlog ", "bold"), (backlog, "yellow" if shown.backlog else "green"),
    )  # fmt: skip
    columns = ("replica", "address", "", "calls/s", "errors/s", "shed/s", "p50 ms", "p95 ms", "queued", "loop lag ms")
    parts: list[Any] = [head, table("", columns, [_cells(row) for row in shown.rows])]
    for shut in shown.open:
        parts.append(
            Text(f"breaker {shut['dependency']} {shut['state']} at {shut['at']}: {shut['cause']}", style="red")
        )
    for step in shown.steps:
        parts.append(Text(f"without {step['step']} {step['subject']} at {step['at']}: {step['cause']}", style="yellow"))
    parts.append(Text("why: loanmesh why-failed   one application: loanmesh trace NAME", style="dim"))
    return Group(*parts)


def _cells(row: Row) -> tuple[str, ...]:
    colour = {"up": "green", "away": "red"}.get(row.state, "yellow")
    return (
        escape(row.instance or "?"), row.address, f"[{colour}]{row.state}[/]", f"{row.calls:,.1f}",
        f"[red]{row.errors:,.1f}[/]" if row.errors else "0", f"[yellow]{row.shed:,.1f}[/]" if row.shed else "0",
        _ms(row.p50_ms), _ms(row.p95_ms), str(row.queued), f"{row.loop_lag_ms:.0f}",
    )  # fmt: skip


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
