"""Break a source of the sandbox and mend it again: to see what the mesh makes of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import UNREACHABLE, USAGE
from loanmesh.cli.folder import State, chosen

CALL_S = 3.0
USUAL: dict[str, object] = {
    "dead": False, "hang": False, "garbage": False, "error_rate": 0.0, "latency_ms": 5.0, "jitter_ms": 2.0,
    "quota_per_s": 0.0,
}  # fmt: skip
TROUBLES: dict[str, dict[str, object]] = {
    "well": USUAL,
    "dead": {"dead": True},
    "hanging": {"hang": True},
    "failing": {"error_rate": 1.0},
    "garbage": {"garbage": True},
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(source)


def source(
    name: Annotated[str, typer.Argument(help="A source, as `deps` shows it (court, tax ...), or `all`.")] = "",
    trouble: Annotated[str, typer.Argument(help=f"{', '.join(TROUBLES)}, or a latency, e.g. 800ms.")] = "",
    state: State = Path(),
    json_: Json = False,
) -> None:
    """Break a source of the sandbox, or mend it; without arguments, show how each is.

    Example: `loanmesh source court dead`, and later `loanmesh source court well`
    """
    console = complaints()
    change = _change(trouble) if trouble else None
    if change is None and trouble:
        console.print(f"[red]TROUBLE[/] must be {', '.join(TROUBLES)} or a latency like 800ms, not {escape(trouble)!r}")
        raise typer.Exit(USAGE)
    folder = chosen(state)
    status, said = asyncio.run(_ask(folder, name, change))
    if status == 0:
        console.print(
            f"[red]not reachable[/]: {escape(said)}; is the mesh up? `loanmesh up` starts one, --state names another"
        )
        raise typer.Exit(UNREACHABLE)
    if status != 200:
        console.print(f"[red]{escape(said.replace('must be *', 'must be all'))}[/]")
        raise typer.Exit(USAGE)
    faults: dict[str, dict[str, Any]] = json.loads(said)
    if json_:
        print_json(faults)
        return
    for one, fault in sorted(faults.items()):
        wrong = ", ".join(_words(key, value) for key, value in fault.items() if value != USUAL.get(key, value))
        person().print(f"{one:16} {f'[red]{wrong}[/]' if wrong else '[green]well[/]'}")
    next_step(_then(name, trouble, faults))


def _then(name: str, trouble: str, faults: dict[str, dict[str, Any]]) -> str:
    if trouble == "well":
        return "what waited is decided within half a minute: `loanmesh list --filter 'state = PENDING'`"
    if trouble:
        return (
            "`loanmesh deps` shows its breaker, `loanmesh why-failed` who waits for it: who was asked about lately is"
            f" decided from cached answers. `loanmesh source {name} well` mends it"
        )
    if any(value != USUAL.get(key, value) for fault in faults.values() for key, value in fault.items()):
        return "`loanmesh source all well` mends all"
    return "`loanmesh source court dead` breaks one"


def _words(fault: str, value: object) -> str:
    return fault if value is True else f"{fault} {value}"


def _change(trouble: str) -> dict[str, object] | None:
    if trouble.endswith("ms") and trouble[:-2].isdecimal():
        return {"latency_ms": int(trouble[:-2])}
    return TROUBLES.get(trouble)


async def _ask(state: Path, name: str, change: dict[str, object] | None) -> tuple[int, str]:
    """HTTP status and text; 0 and why where nobody answers."""
    import aiohttp

    from loanmesh.cli import processes

    address = await processes.sandbox(state)
    url = f"http://{address}/control/faults"
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CALL_S)) as session:
            if change is None:
                answer = await session.get(url)
            else:
                answer = await session.post(url, json={"source": "*" if name == "all" else name, **change})
            return answer.status, await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return 0, f"the sandbox at {address}: {type(error).__name__}"
