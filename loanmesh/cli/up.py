"""The commands that run a mesh on this machine: up, scale, demo."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import FAILED, INTERRUPTED, UNREACHABLE, USAGE
from loanmesh.cli.folder import State, chosen, default_state
from loanmesh.cli.running import run


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    for command in (up, scale, demo):
        app.command()(command)


def up(
    state: State = Path(),
    data: Annotated[Path | None, typer.Option(envvar="LOANMESH_DATA", help="Folder of the real data sets.")] = None,
    port_base: Annotated[int, typer.Option(envvar="LOANMESH_PORT_BASE", help="First of six consecutive ports.")] = 7401,
    replicas: Annotated[
        list[str] | None, typer.Option(help="How many of each service, e.g. intake=2,bureau=2. May be repeated.")
    ] = None,
    database: Annotated[
        str,
        typer.Option(
            envvar="LOANMESH_DATABASE",
            help="`postgres` starts one in the state folder; `postgresql://...` names one; else SQLite files.",
        ),
    ] = "",
    tls: Annotated[
        bool, typer.Option("--tls", help="With mTLS between all, by certificates made in the state folder.")
    ] = False,
    json_: Json = False,
) -> None:
    """Run the whole mesh on this machine until Ctrl-C; a second `up` on the same state goes on where the first ended.

    Example: `loanmesh up --state ./var --port-base 7501 --replicas intake=2,bureau=2 --database postgres`
    """
    from loanmesh.cli.mesh import OWN_POSTGRES, CannotStart, Mesh, ports_from, read_replicas
    from loanmesh.runtime.clock import SystemClock
    from loanmesh.runtime.supervised import end_with_supervisor

    console = person(json_)
    state = chosen(state)
    check_state(console, state)
    if not 1 <= port_base <= 65530:
        console.print("[red]--port-base[/] must be 1 to 65530")
        raise typer.Exit(USAGE)
    if database and database != OWN_POSTGRES and not database.startswith(("postgresql://", "postgres://")):
        console.print(f"[red]--database[/] must be {OWN_POSTGRES} or postgresql://..., not {escape(database)!r}")
        raise typer.Exit(USAGE)
    try:
        counts = read_replicas(replicas or [])
    except ValueError as error:
        console.print(f"[red]--replicas[/] {escape(str(error))}")
        raise typer.Exit(USAGE) from error

    async def serve() -> None:
        try:
            mesh = Mesh(
                state,
                data,
                ports_from(port_base),
                SystemClock(),
                lambda line: console.print(f"[dim]{escape(line)}[/]"),
                replicas=counts,
                database=database,
                tls=tls,
            )
        except CannotStart as error:
            console.print(f"[red]cannot start[/]: {escape(str(error))}")
            raise typer.Exit(FAILED) from error
        stopping = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stopping.set)
        end_with_supervisor(stopping.set)
        try:
            console.print("starting intake, bureau, scoring, pricing and a sandbox of five sources ...")
            await _unless(stopping, mesh.start())
            if json_:
                print_json(mesh.ready_line())
            else:
                console.print(_replica_lines(mesh.ready_line()), soft_wrap=True)
                if mesh.certs:
                    console.print(
                        f"  mTLS; other commands need to know:  export {connection.CERTS}={mesh.certs}", soft_wrap=True
                    )
                if state != default_state():
                    console.print(
                        f"  other commands need to know:  export LOANMESH_STATE={state.resolve()}", soft_wrap=True
                    )
                console.print(f"[green]ready[/]; state in {state}. Ctrl-C stops.")
                next_step(
                    "in another window: `loanmesh top` shows it live, `loanmesh example > a.json` and `loanmesh"
                    " submit a.json` send an application"
                )
            await stopping.wait()
            console.print("stopping ...")
        except CannotStart as error:
            console.print(f"[red]cannot start[/]: {escape(str(error))}")
            raise typer.Exit(FAILED) from error
        finally:
            await mesh.stop()
        console.print("stopped; nothing is left running")
        if not json_:
            next_step("the same `loanmesh up` goes on where this one ended")

    run(serve())


async def _unless(stopping: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but leave it and exit with 130 when asked to stop before it is done."""
    working, asked = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    await asyncio.wait((working, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not working.done():
        working.cancel()
        await asyncio.wait((working,))
        raise typer.Exit(INTERRUPTED)
    await working


def scale(
    replicas: Annotated[list[str] | None, typer.Argument(help="SERVICE=N, several if you like.")] = None,
    state: State = Path(),
    json_: Json = False,
) -> None:
    """Add or remove replicas of a running mesh, while it works; without arguments, show what runs.

    Example: `loanmesh scale intake=3 bureau=2`
    """
    from loanmesh.cli import control
    from loanmesh.cli.mesh import read_replicas

    complain = complaints()
    try:
        answer = run(control.ask(chosen(state), read_replicas(replicas or [])))
    except ValueError as error:
        complain.print(f"[red]SERVICE=N[/] {escape(str(error))}")
        raise typer.Exit(USAGE) from error
    except control.NoMesh as error:
        complain.print(f"[red]not reachable[/]: {escape(str(error))}; `loanmesh up` starts one, --state names another")
        raise typer.Exit(UNREACHABLE) from error
    if json_:
        print_json(answer)
    else:
        person(whole=True).print(_replica_lines(answer))
    if "error" in answer:
        complain.print(f"[red]not scaled[/]: {escape(str(answer['error']))}")
        raise typer.Exit(FAILED)
    if not json_:
        next_step("`loanmesh top` shows how traffic spreads" if replicas else "`loanmesh scale scoring=3` adds one")


def _replica_lines(ready: dict[str, Any]) -> str:
    rows = [
        f"  {one['name']:10} {one['address']}  pid {one['pid']}" for all_ in ready["replicas"].values() for one in all_
    ]
    return "\n".join([*rows, f"  for clients: {ready['targets']['intake']} is all of intake, also what is added later"])


def demo(json_: Json = False) -> None:
    """Decide 200 synthetic applications on a mesh of its own, lose two sources, get them back. About half a minute.

    Example: `loanmesh demo`
    """
    from loanmesh.cli.demo import demo as show_demo
    from loanmesh.runtime.clock import SystemClock

    console = person(json_)
    with tempfile.TemporaryDirectory(prefix="loanmesh-demo-") as folder:
        figures = run(show_demo(console, Path(folder), SystemClock()))
    if json_:
        print_json(figures)
    else:
        next_step("`loanmesh up` runs a mesh that stays; README.md, Use, goes on from there")


def check_state(console: Console, state: Path) -> None:
    """End with 2 where the folder cannot be made or written."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state):
            pass
    except OSError as error:
        why = "it is no folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        console.print(f"[red]--state[/] {escape(str(state))} cannot be used: {why}", soft_wrap=True)
        raise typer.Exit(USAGE) from error
