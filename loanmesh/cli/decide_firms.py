"""`loanmesh decide-firms`: the command; what it does is in firms.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.answer import Json, next_step, person, print_json
from loanmesh.cli.application_name import short
from loanmesh.cli.codes import FAILED, UNREACHABLE, USAGE
from loanmesh.cli.folder import State, chosen
from loanmesh.cli.running import run
from loanmesh.cli.up import check_state


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("decide-firms")(decide_firms)


def decide_firms(
    data: Annotated[Path, typer.Argument(help="Folder of the real data sets.")],
    out: Annotated[Path | None, typer.Option(help="Write one line a firm as CSV.")] = None,
    amount: Annotated[int, typer.Option(help="CNY that each firm asks for.", min=1)] = 500_000,
    term: Annotated[int, typer.Option(help="Months.", min=1, max=360)] = 12,
    address: Annotated[str, typer.Option(help="Intake of a running mesh; without it, one is started for this.")] = "",
    sandbox: Annotated[str, typer.Option(help="Its sandbox.")] = "127.0.0.1:7405",
    patience: Annotated[float, typer.Option(help="Seconds to bear with a mesh that is away.", min=1)] = 60.0,
    state: State = Path(),
    json_: Json = False,
) -> None:
    """Decide the 302 unrated Chinese firms from their invoices. May be repeated: the same requests, the same decisions.

    Example: `loanmesh decide-firms ../data --out firms.csv`
    """
    from loanmesh.cli import firms as firms_
    from loanmesh.cli.mesh import CannotStart, Mesh, free_ports
    from loanmesh.cli.stages import Stages, ask_stages
    from loanmesh.runtime.clock import SystemClock

    console = person(json_)
    clock = SystemClock()
    folder = data.resolve()
    stages = Stages()
    if out:
        try:
            firms_.check_writable(out)
        except OSError as error:
            console.print(f"[red]--out[/] cannot be written: {escape(str(out))}: {error.strerror}; nothing was sent")
            raise typer.Exit(USAGE) from error

    async def on(intake: str, source: str) -> Any:
        await firms_.teach(source, folder)
        started = clock.monotonic()
        async with connection.client(intake, patience_s=patience) as client:
            decided = await firms_.decide_firms(console, client, codes, amount * 100, term, clock, stages)
            took_s = clock.monotonic() - started
            await ask_stages(client, decided, stages)
        return decided, took_s

    async def work() -> Any:
        if address:
            return await on(address, sandbox)
        folder_of_mesh = chosen(state)
        check_state(console, folder_of_mesh)
        mesh = Mesh(folder_of_mesh, data, free_ports(), clock, lambda line: console.print(f"[dim]{escape(line)}[/]"))
        try:
            console.print("no --address: starting a mesh for this ...")
            await mesh.start()
            return await on(mesh.parts["intake"].address, mesh.parts["sandbox"].address)
        finally:
            await mesh.stop()

    try:
        codes = firms_.read_firms(data)
        decided, took_s = run(work())
    except firms_.CannotRead as error:
        console.print(f"[red]{escape(str(error))}[/]; nothing was sent")
        raise typer.Exit(USAGE) from error
    except CannotStart as error:
        console.print(f"[red]cannot start[/]: {escape(str(error))}")
        raise typer.Exit(FAILED) from error
    except OSError as error:
        console.print(f"[red]not reachable[/]: the sandbox at {sandbox}: {error}")
        raise typer.Exit(UNREACHABLE) from error
    firms_.report(console, decided, took_s, stages)
    if json_:
        from loanmesh.cli import show

        print_json({firm: json.loads(show.as_json(a)) for firm, a in decided.items()})
    if out:
        try:
            firms_.write_csv(out, decided)
        except OSError as error:
            console.print(f"[red]--out[/] could not be written: {escape(str(out))}: {error.strerror}")
            raise typer.Exit(FAILED) from error
        console.print(f"wrote {escape(str(out))}", soft_wrap=True)
    if not json_:
        where = "" if address else "`loanmesh up`, then "
        next_step(
            f"{where}`loanmesh explain {short(next(iter(decided.values())).name)}` says why, of each; the same command"
            " again asks for the same decisions"
        )
