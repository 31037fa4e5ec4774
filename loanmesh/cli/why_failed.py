"""`loanmesh why-failed`: what went wrong lately, by root cause, the most frequent first."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import UNREACHABLE, USAGE
from loanmesh.cli.folder import State, chosen
from loanmesh.cli.trace import Jaeger, traces_at
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.seeing.causes import Group, why_failed
from loanmesh.seeing.spans import CannotRead, Traces

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("why-failed")(why_failed_command)


def why_failed_command(
    since: Annotated[
        str, typer.Option(help="How far back: 30s, 10m, 2h, 1d; or a time, 2026-11-25T14:00:00Z.")
    ] = "10m",
    state: State = Path(),
    jaeger: Jaeger = "",
    json_: Json = False,
) -> None:
    """Group everything that failed, was turned away or came late by its root cause, the most frequent first.

    Counts applications, and calls that stored none. Example: `loanmesh why-failed --since 10m`
    """
    complain = complaints()
    clock = SystemClock()
    try:
        began = since_when(since, clock)
    except ValueError as error:
        complain.print(
            f"[red]--since[/] must be a number with s, m, h or d, as 10m, or a time as 2026-11-25T14:00:00Z,"
            f" not {escape(repr(since))}"
        )
        raise typer.Exit(USAGE) from error
    folder = chosen(state)
    try:
        groups = asyncio.run(ask(traces_at(folder, jaeger), folder, began))
    except CannotRead as error:
        complain.print(f"[red]not reachable[/]: {error}")
        raise typer.Exit(UNREACHABLE) from error
    if json_:
        print_json([{**asdict(group), "over": group.over} for group in groups])
    else:
        show(person(whole=True), groups, since)
        next_step(after(groups))


def since_when(text: str, clock: Clock) -> float:
    """`10m` before now, or an ISO 8601 time, as seconds since 1970. Raises ValueError."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text):
        return clock.now().timestamp() - float(found[1]) * _UNITS[found[2]]
    return dt.datetime.fromisoformat(text).astimezone().timestamp()


async def ask(traces: Traces, state: Path, began: float) -> list[Group]:
    """Everything that went wrong since then (seconds since 1970), by cause."""
    spans = await traces.since(began)
    return why_failed(spans, await traces.last_seen(), await _alive(state))


async def _alive(state: Path) -> set[str]:
    """Process ids of the replicas of the mesh that runs on `state`; none where none does."""
    from loanmesh.cli import control

    try:
        running = await control.ask(state, {})
    except control.NoMesh:
        return set()
    return {str(one["pid"]) for replicas in running["replicas"].values() for one in replicas}


def show(console: Console, groups: Sequence[Group], since: str) -> None:
    """For a person: each cause with how often, since when, whether it is over, and an example."""
    if not groups:
        console.print(f"[green]nothing failed or came late[/] since {escape(since)}")
    for group in groups:
        cause = group.cause
        console.print(f"[bold]{group.count:>6}[/]  [red]{escape(cause.what)}[/]")
        console.print(
            f"        {escape(cause.hop)}, {cause.status}, {_clock(group.first_at)} to {_clock(group.last_at)}"
        )
        if group.breaker:
            console.print(f"        breaker opened: {escape(group.breaker)}")
        if group.over and group.decided_at:
            console.print(f"        [green]over[/]: all are decided, the last at {_clock(group.decided_at)}")
        elif group.undecided:
            console.print(f"        [yellow]not over[/]: {group.undecided} are not decided yet")
        console.print(f"        [dim]example[/] loanmesh trace {group.example}")


def after(groups: Sequence[Group]) -> str:
    """What to do next: about the most frequent cause that is not over."""
    if not groups:
        return "`loanmesh top` shows the mesh now"
    group = next((group for group in groups if not group.over), None)
    if group is None:
        return f"nothing is left to mend; `loanmesh trace {groups[0].example}` shows how one went"
    then, look = group.cause.then.replace("EXAMPLE", group.example), f"loanmesh trace {group.example}"
    return f"`{then}`" + ("" if then == look else f"; `{look}` shows one of them, call by call")


def _clock(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).astimezone().strftime("%H:%M:%S")
