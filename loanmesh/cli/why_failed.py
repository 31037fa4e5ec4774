"""`loanmesh why-failed`: what went wrong lately, by root cause, the most frequent first."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli.folder import State, chosen
from loanmesh.cli.trace import Jaeger, traces_at
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.seeing.causes import Group, why_failed
from loanmesh.seeing.spans import CannotRead, Traces

UNREACHABLE, USAGE = 3, 2
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
    json_: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Group everything that failed, was turned away or came late by its root cause, the most frequent first.

    Counts applications, and calls that stored none. Example: `loanmesh why-failed --since 10m`
    """
    complain = Console(stderr=True, highlight=False, soft_wrap=True)
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
        print(json.dumps([asdict(group) for group in groups], ensure_ascii=False))
    else:
        show(Console(highlight=False, soft_wrap=True), groups, since)


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
    """For a person: each cause with how often, since when, an example, and what to do next."""
    if not groups:
        console.print(f"[green]nothing failed or came late[/] since {since}. `loanmesh top` shows the mesh now")
        return
    for group in groups:
        cause = group.cause
        console.print(f"[bold]{group.count:>6}[/]  [red]{escape(cause.what)}[/]")
        console.print(
            f"        {escape(cause.hop)}, {cause.status}, {_clock(group.first_at)} to {_clock(group.last_at)}"
        )
        if group.breaker:
            console.print(f"        breaker opened: {escape(group.breaker)}")
        console.print(f"        [dim]example[/] loanmesh trace {group.example}")
        if "EXAMPLE" not in cause.then:
            console.print(f"        [dim]next[/]    {cause.then}")


def _clock(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).astimezone().strftime("%H:%M:%S")
