"""The `loanmesh` command: thin, over the client library.

Exit codes: 0 done, 1 failed, 2 wrong usage, file or setting, 3 mesh not reachable, 4 refused, 130 interrupted.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh import __version__
from loanmesh.cli import certs, connection, erase, keys, ops, parked, promotion, serve, source, top, trace, why_failed
from loanmesh.cli.folder import default_state

app = connection.App(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Decides loan applications. Start with `loanmesh demo`, or `loanmesh up` and `loanmesh submit FILE`.",
)
FAILED, USAGE, UNREACHABLE, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130
PATIENCE_S = 5.0
"""How long a person at a prompt waits for a mesh that is away."""
T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Address = Annotated[str, typer.Option(envvar="LOANMESH_ADDRESS", help="Address of intake.")]
Lender = Annotated[str, typer.Option(envvar="LOANMESH_LENDER", help="The lender, lenders/NAME.")]
Name = Annotated[str, typer.Argument(help="The application, lenders/NAME/applications/ID.")]
INTAKE = "127.0.0.1:7401"
DEMO_LENDER = "lenders/demo"


State = Annotated[
    Path, typer.Option(envvar="LOANMESH_STATE", help="Folder for databases and logs.", show_default=False)
]


def _say(json_: bool) -> Console:
    return Console(stderr=json_, highlight=False)


def _check_state(console: Console, state: Path) -> None:
    """End with 2 where the folder cannot be made or written."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=state):
            pass
    except OSError as error:
        why = "it is no folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        console.print(f"[red]--state[/] {escape(str(state))} cannot be used: {why}", soft_wrap=True)
        raise typer.Exit(USAGE) from error


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; turn what went wrong into one line and an exit code."""
    from loanmesh.client import CallFailed, Overloaded, TlsFailed, Unreachable

    complain = Console(stderr=True, highlight=False)
    try:
        return asyncio.run(work)
    except CallFailed as error:
        complain.print(f"[red]refused[/] {error.code}: {escape(str(error))}")
        for field, rule in error.violations:
            complain.print(f"  {escape(field)}: {escape(rule)}")
        raise typer.Exit(REFUSED) from error
    except Overloaded as error:
        complain.print(f"[red]too busy[/]: {escape(str(error))}; send it again with the same --request-id")
        raise typer.Exit(UNREACHABLE) from error
    except TlsFailed as error:
        complain.print(
            f"[red]not reachable[/] ({error.error_type}): {error}; --tls-ca, --tls-cert and --tls-key name our files,"
            " `loanmesh certs show` tells how they are"
        )
        raise typer.Exit(UNREACHABLE) from error
    except Unreachable as error:
        complain.print(
            f"[red]not reachable[/]: {error}; is the mesh up? `loanmesh up` starts one, --address names another"
        )
        raise typer.Exit(UNREACHABLE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error


def _read_application(path: Path) -> Any:
    from loanmesh.cli.application_file import BadFile, read_application

    try:
        return read_application(path)
    except BadFile as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{escape(str(error))}[/]; nothing was sent")
        raise typer.Exit(USAGE) from error


@app.command()
def up(
    state: State = default_state(),  # noqa: B008  A path, computed once a process.
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
    from loanmesh.cli.mesh import DEFAULT_PORTS, OWN_POSTGRES, CannotStart, Mesh, ports_from, read_replicas
    from loanmesh.runtime.clock import SystemClock
    from loanmesh.runtime.supervised import end_with_supervisor

    console = _say(json_)
    _check_state(console, state)
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
            await _unless(stopping, mesh.start())
            if json_:
                print(json.dumps(mesh.ready_line()), flush=True)
            else:
                console.print(_replica_lines(mesh.ready_line()))
                if mesh.certs:
                    console.print(
                        f"  mTLS; other commands need to know:  export {connection.CERTS}={mesh.certs}", soft_wrap=True
                    )
                if port_base != DEFAULT_PORTS["intake"] or state != default_state():
                    console.print(
                        f"  other commands need to know:  export LOANMESH_STATE={state}"
                        f" LOANMESH_ADDRESS={mesh.parts['intake'].address}",
                        soft_wrap=True,
                    )
                console.print(f"[green]ready[/]; state in {state}. Try: loanmesh submit FILE. Ctrl-C stops.")
            await stopping.wait()
            console.print("stopping ...")
        except CannotStart as error:
            console.print(f"[red]cannot start[/]: {escape(str(error))}")
            raise typer.Exit(FAILED) from error
        finally:
            await mesh.stop()
        console.print("stopped; nothing is left running. The same `loanmesh up` goes on where this one ended.")

    _run(serve())


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


@app.command()
def scale(
    replicas: Annotated[list[str] | None, typer.Argument(help="SERVICE=N, several if you like.")] = None,
    state: State = default_state(),  # noqa: B008  A path, computed once a process.
    json_: Json = False,
) -> None:
    """Add or remove replicas of a running mesh, while it works; without arguments, show what runs.

    Example: `loanmesh scale intake=3 bureau=2`
    """
    from loanmesh.cli import control
    from loanmesh.cli.mesh import read_replicas

    complain = Console(stderr=True, highlight=False)
    try:
        answer = _run(control.ask(state, read_replicas(replicas or [])))
    except ValueError as error:
        complain.print(f"[red]SERVICE=N[/] {escape(str(error))}")
        raise typer.Exit(USAGE) from error
    except control.NoMesh as error:
        complain.print(f"[red]not reachable[/]: {escape(str(error))}; `loanmesh up` starts one, --state names another")
        raise typer.Exit(UNREACHABLE) from error
    if json_:
        print(json.dumps(answer))
    else:
        _say(False).print(_replica_lines(answer))
        _say(False).print("next: `loanmesh top` shows how traffic spreads")
    if "error" in answer:
        complain.print(f"[red]not scaled[/]: {escape(str(answer['error']))}")
        raise typer.Exit(FAILED)


def _replica_lines(ready: dict[str, Any]) -> str:
    rows = [
        f"  {one['name']:10} {one['address']}  pid {one['pid']}" for all_ in ready["replicas"].values() for one in all_
    ]
    return "\n".join([*rows, f"  all of intake, those to come too: {ready['targets']['intake']}"])


@app.command()
def demo(json_: Json = False) -> None:
    """Decide 200 synthetic applications on a mesh of its own, lose two sources, get them back. About half a minute.

    Example: `loanmesh demo`
    """
    from loanmesh.cli.demo import demo as show_demo
    from loanmesh.runtime.clock import SystemClock

    console = _say(json_)
    with tempfile.TemporaryDirectory(prefix="loanmesh-demo-") as folder:
        figures = _run(show_demo(console, Path(folder), SystemClock()))
    if json_:
        print(json.dumps(figures))


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="The application as JSON; - reads standard input.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for the decision, 0 to 60.", min=0, max=60)] = 10.0,
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    address: Address = INTAKE,
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """Submit one application and wait a little for its decision.

    Example: `loanmesh example person 7 > a.json && loanmesh submit a.json`
    """
    from loanmesh.cli import show

    application = _read_application(file)

    async def work() -> Any:
        async with connection.client(address, lender=lender, patience_s=PATIENCE_S) as client:
            return await client.submit(application, request_id=request_id, wait_s=wait)

    _print(_run(work()), json_, show.application)


@app.command()
def example(
    kind: Annotated[str, typer.Argument(help="person or firm")] = "person",
    index: Annotated[int, typer.Argument(help="Which synthetic subject.", min=0, max=9_999_999)] = 1,
) -> None:
    """Print the application of a synthetic subject that the sandbox knows, to submit or to change.

    Example: `loanmesh example firm 3 > firm.json`
    """
    from lab.population import Population
    from loanmesh.runtime.clock import SystemClock

    if kind not in ("person", "firm"):
        raise typer.BadParameter("must be person or firm")
    found = Population().application("person" if kind == "person" else "firm", index, SystemClock().now())
    print(json.dumps(found, ensure_ascii=False, indent=2))


@app.command()
def get(name: Name, address: Address = INTAKE, json_: Json = False) -> None:
    """Show one application.

    Example: `loanmesh get lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await client.get(name)

    _print(_run(work()), json_, show.application)


@app.command()
def watch(name: Name, address: Address = INTAKE, json_: Json = False) -> None:
    """Follow an application until it is decided.

    Example: `loanmesh watch lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    async def work() -> None:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            async for application in client.watch(name):
                _print(application, json_, show.application)

    _run(work())


@app.command("list")
def list_(
    filter_: Annotated[str, typer.Option("--filter", help="e.g. 'state = DECIDED AND outcome = DECLINED'")] = "",
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 20,
    order: Annotated[str, typer.Option(help="create_time or 'create_time desc'")] = "",
    page: Annotated[str, typer.Option(help="Token of the page before.")] = "",
    address: Address = INTAKE,
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """List a lender's applications, newest first.

    Example: `loanmesh list --filter 'outcome = DECLINED' --limit 5`
    """
    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, lender=lender, patience_s=PATIENCE_S) as client:
            return await client.list(filter=filter_, order_by=order, page_size=limit, page_token=page)

    found = _run(work())
    if json_:
        print(show.as_json(found))
        return
    show.applications(_say(False), found.applications)
    if found.next_page_token:
        # Plain, so that it stays whole: it is to be copied.
        print(f"more: --page {found.next_page_token}")


@app.command()
def explain(
    name: Name,
    schedules: Annotated[bool, typer.Option("--schedules", help="Add each offer's instalments.")] = False,
    language: Annotated[Literal["zh", "en", "both"], typer.Option(help="In which language.")] = "both",
    address: Address = INTAKE,
    json_: Json = False,
) -> None:
    """Say why an application was decided so, with the sources.

    Example: `loanmesh explain lenders/demo/applications/0192... --schedules --language zh`
    """
    from functools import partial

    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await client.explain(name, schedules=schedules)

    _print(_run(work()), json_, partial(show.explanation, language=language))


@app.command()
def replay(name: Name, address: Address = INTAKE, json_: Json = False) -> None:
    """Decide once more from the stored evidence, and say whether the same comes out. Ends with 1 where it does not.

    Example: `loanmesh replay lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await client.replay(name)

    found = _run(work())
    _print(found, json_, show.replay)
    if not found.same:
        raise typer.Exit(FAILED)


@app.command()
def history(name: Name, address: Address = INTAKE, json_: Json = False) -> None:
    """Show what happened to an application, and whether its record is intact.

    Example: `loanmesh history lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await client.history(name)

    found = _run(work())
    if json_:
        print(show.as_json(found))
        return
    rows = [
        (show.time_of(e.event_time), e.kind, ", ".join(f"{k}={v}" for k, v in sorted(e.details.items()) if v), e.actor)
        for e in found.events
    ]
    console = _say(False)
    console.print(show.table("", ("when", "what", "details", "by"), rows))
    console.print("[green]record intact[/]" if found.chain_intact else "[red]the record was changed[/]")


@app.command()
def accept(
    name: Name,
    offer: Annotated[str, typer.Argument(help="Which offer.")] = "offer-1",
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    address: Address = INTAKE,
    json_: Json = False,
) -> None:
    """Accept an offer.

    Example: `loanmesh accept lenders/demo/applications/0192... offer-1`
    """
    from loanmesh.cli import show

    async def work() -> Any:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await client.accept(name, offer, request_id=request_id)

    _print(_run(work()), json_, show.application)


@app.command()
def settings(
    service: Annotated[str, typer.Argument(help="intake, bureau, scoring or pricing")],
    json_: Json = False,
) -> None:
    """Print every setting of a service as a start from here would read it: name, value, what it does. Secrets masked.

    Example: `loanmesh settings intake`
    """
    from dataclasses import asdict

    from loanmesh.cli import knobs

    if service not in knobs.SECTIONS:
        raise typer.BadParameter(f"must be one of {', '.join(knobs.SECTIONS)}")
    lines = knobs.in_force(service)
    if json_:
        print(json.dumps([asdict(line) for line in lines], ensure_ascii=False))
    else:
        knobs.show(_say(False), lines)


@app.command("decide-firms")
def decide_firms(
    data: Annotated[Path, typer.Argument(help="Folder of the real data sets.")],
    out: Annotated[Path | None, typer.Option(help="Write one line a firm as CSV.")] = None,
    amount: Annotated[int, typer.Option(help="CNY that each firm asks for.", min=1)] = 500_000,
    term: Annotated[int, typer.Option(help="Months.", min=1, max=360)] = 12,
    address: Annotated[str, typer.Option(help="Intake of a running mesh; without it, one is started for this.")] = "",
    sandbox: Annotated[str, typer.Option(help="Its sandbox.")] = "127.0.0.1:7405",
    patience: Annotated[float, typer.Option(help="Seconds to bear with a mesh that is away.", min=1)] = 60.0,
    state: State = default_state(),  # noqa: B008  A path, computed once a process.
    json_: Json = False,
) -> None:
    """Decide the 302 unrated Chinese firms from their invoices. May be repeated: the same requests, the same decisions.

    Example: `loanmesh decide-firms ../data --out firms.csv`
    """
    from loanmesh.cli import firms as firms_
    from loanmesh.cli.mesh import CannotStart, Mesh, free_ports
    from loanmesh.cli.stages import Stages, ask_stages
    from loanmesh.runtime.clock import SystemClock

    console = _say(json_)
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
        _check_state(console, state)
        mesh = Mesh(state, data, free_ports(), clock, lambda line: console.print(f"[dim]{escape(line)}[/]"))
        try:
            console.print("no --address: starting a mesh for this ...")
            await mesh.start()
            return await on(mesh.parts["intake"].address, mesh.parts["sandbox"].address)
        finally:
            await mesh.stop()

    try:
        codes = firms_.read_firms(data)
        decided, took_s = _run(work())
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

        print(json.dumps({firm: json.loads(show.as_json(a)) for firm, a in decided.items()}, ensure_ascii=False))
    if out:
        try:
            firms_.write_csv(out, decided)
        except OSError as error:
            console.print(f"[red]--out[/] could not be written: {escape(str(out))}: {error.strerror}")
            raise typer.Exit(FAILED) from error
        console.print(f"wrote {escape(str(out))}", soft_wrap=True)


def _print(message: Any, json_: bool, show_: Any) -> None:
    from loanmesh.cli import show

    if json_:
        print(show.as_json(message), flush=True)
    else:
        show_(_say(False), message)


def _version(asked: bool) -> None:
    if asked:
        print(f"loanmesh {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    del version


erase.register(app)
keys.register(app)
ops.register(app)
certs.register(app)
serve.register(app)
promotion.register(app)
trace.register(app)
why_failed.register(app)
top.register(app)
parked.register(app)
source.register(app)


def main() -> None:
    """Run the command."""
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lab":
            raise
        # The image of the services has no laboratory in it.
        Console(stderr=True).print(
            "this command needs the laboratory, which is not installed here: run it in a checkout"
        )
        raise SystemExit(USAGE) from error


if __name__ == "__main__":
    main()
