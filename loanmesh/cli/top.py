"""`loanmesh top`: the mesh as it works: rates, errors, latency, backlog, breakers, replicas."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from loanmesh.cli import connection
from loanmesh.cli.answer import IS_IT_UP, NEXT, Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import INTERRUPTED, UNREACHABLE
from loanmesh.cli.folder import State, chosen
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.seeing.rates import Look, Picture, Row, picture

CALL_S = 2.0
"""How long a process may take to answer before it counts as away."""
WIDE = 105
"""Columns from which on replicas have their long names, as logs and traces name them."""


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
    json_: Json = False,
) -> None:
    """Show the mesh as it works, refreshed each second: what comes in, what is decided, errors, latency, breakers.

    shed: turned away, being too busy. queue: entries that wait in memory. lag: how late the event loop was at most
    within the last minute. p50, p95: half, and 95 in 100, of the calls took no longer.

    Example: `loanmesh top --once`
    """
    folder = chosen(state)
    clock = SystemClock()
    try:
        if json_ or once or not sys.stdout.isatty():
            shown = asyncio.run(_one(folder, address or [], every, clock))
            if json_:
                print_json(asdict(shown))
            else:
                console = person()
                console.print(draw(shown, wide=console.width >= WIDE))
                if not _nobody(shown):
                    next_step(then(shown))
        else:
            shown = asyncio.run(_live(folder, address or [], every, clock))
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    if _nobody(shown):
        complaints().print(f"[red]not reachable[/]: {IS_IT_UP}")
        raise typer.Exit(UNREACHABLE)


def _nobody(shown: Picture) -> bool:
    return all(row.state == "away" for row in shown.rows)


async def _one(state: Path, addresses: Sequence[str], every_s: float, clock: Clock) -> Picture:
    before = await look(state, addresses, clock)
    await clock.sleep(every_s)
    return picture(before, await look(state, addresses, clock))


async def _live(state: Path, addresses: Sequence[str], every_s: float, clock: Clock) -> Picture:
    before = await look(state, addresses, clock)
    shown = picture(before, before)
    console = person()

    def drawn() -> Group:
        return Group(draw(shown, wide=console.width >= WIDE), Text(f"{NEXT}{then(shown)}", style="dim"))

    with Live(drawn(), console=console, auto_refresh=False, screen=False) as live:
        while not _nobody(shown):
            await clock.sleep(every_s)
            after = await look(state, addresses, clock)
            shown, before = picture(before, after), after
            live.update(drawn(), refresh=True)
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


def draw(shown: Picture, *, wide: bool) -> Group:
    """For a person; `wide` where there is room for long names."""
    from loanmesh.cli.show import table

    backlog = "?" if shown.backlog is None else f"{shown.backlog:,} due now"
    head = Text.assemble(
        ("in ", "bold"), f"{shown.accepted:,.1f}/s   ", ("decided ", "bold"), f"{shown.decided:,.1f}/s   ",
        ("backlog ", "bold"), (backlog, "yellow" if shown.backlog else "green"),
    )  # fmt: skip
    columns = ("replica", "address", "", "call/s", "err/s", "shed/s", "p50 ms", "p95 ms", "queue", "lag ms")
    replicas = table("", columns, [_cells(row, wide) for row in shown.rows], words=3)
    replicas.padding = (0, 2 if wide else 1, 0, 0)
    parts: list[Any] = [head, *(_rest(one) for one in shown.resting), replicas]
    where = {row.instance: f"{row.service} {row.address}" for row in shown.rows}
    for shut in shown.open:
        at = where.get(shut["at"], shut["at"])
        parts.append(Text(f"breaker {shut['dependency']} {shut['state']} at {at}: {shut['cause']}", style="red"))
    for step in shown.steps:
        at = where.get(step["at"], step["at"])
        parts.append(Text(f"without {step['step']} {step['subject']} at {at}: {step['cause']}", style="yellow"))
    return Group(*parts)


def _rest(one: dict[str, str | int | float]) -> Text:
    again = dt.datetime.fromtimestamp(float(one["retry_at"]), dt.UTC).astimezone()
    return Text(
        f"resting {one['applications']:,} wait for {one['waiting_for']}, tried again from {again:%H:%M:%S} on",
        style="yellow",
    )


def then(shown: Picture) -> str:
    """What a person may do next, by what is seen."""
    if shown.open:
        return "`loanmesh deps` shows the breakers, `loanmesh why-failed` who waits for them"
    return "`loanmesh why-failed` says what failed or waits; `loanmesh trace NAME` shows one application"


def _cells(row: Row, wide: bool) -> tuple[str, ...]:
    colour = {"up": "green", "away": "red"}.get(row.state, "yellow")
    name = row.instance if wide else row.service
    return (
        escape(name or "?"), row.address, f"[{colour}]{row.state}[/]", _short(row.calls),
        f"[red]{_short(row.errors)}[/]" if row.errors else "0", f"[yellow]{_short(row.shed)}[/]" if row.shed else "0",
        _ms(row.p50_ms), _ms(row.p95_ms), str(row.queued), f"{row.loop_lag_ms:.0f}",
    )  # fmt: skip


def _ms(value: float | None) -> str:
    return "-" if value is None else _short(value)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
