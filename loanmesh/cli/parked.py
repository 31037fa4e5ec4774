"""`loanmesh parked`: what is parked, why, and setting it going again. Thin, over ParkingService."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.actor import Actor, who
from loanmesh.cli.answer import IS_IT_UP, Json, complaints, next_step, person, print_json
from loanmesh.cli.application_name import DEMO_LENDER, Lender, Name, short, whole
from loanmesh.cli.codes import REFUSED, UNREACHABLE
from loanmesh.cli.connection import Address

if TYPE_CHECKING:
    from lending.intake.v1 import parking_service_pb2 as pb
    from lending.intake.v1.parking_service_pb2_grpc import ParkingServiceAsyncStub

CALL_S = 10.0
"""How long intake may take to answer: it reads and writes its store to do so."""
A_CALL = 100
"""Most applications that one call sets going."""
T = TypeVar("T")
Cause = Annotated[str, typer.Option(help="Only those of this cause, as `list` shows it, e.g. scoring_error.")]

commands = connection.App(no_args_is_help=True, rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    app.add_typer(
        commands,
        name="parked",
        help="Applications that always broke a stage: `list` them, `show` one, `release` them once that is mended.",
    )


@commands.command("list")
def list_(address: Address = "", cause: Cause = "", json_: Json = False) -> None:
    """List what is parked, longest first: stage, cause, error type, trace.

    Example: `loanmesh parked list --cause scoring_error`
    """
    from google.protobuf import json_format

    found = _run(address, lambda stub: _collect(_parked(stub, cause)))
    console = person(json_)
    if json_:
        for one in found:
            print_json(json_format.MessageToDict(one))
        return
    if not found:
        of_cause = f" with cause {escape(cause)}" if cause else ""
        console.print(f"[green]nothing is parked[/]{of_cause}")
        next_step("nothing; `loanmesh why-failed` says what else went wrong lately")
        return
    _print_table(console, found)
    (most, _), *_ = Counter(one.cause for one in found).most_common(1)
    next_step(
        f"`loanmesh trace {short(found[0].name)}` shows where the first broke; once that is mended"
        f' `loanmesh parked release --all --cause {most} --reason "what was mended"`'
    )


@commands.command()
def show(
    name: Name,
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """Show one parked application: why it is parked, its trace, and all that happened to it.

    Example: `loanmesh parked show lenders/demo/applications/0192f0c1-...`
    """
    from google.protobuf import json_format
    from lending.intake.v1 import intake_service_pb2 as intake
    from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub

    wanted = whole(name, lender)

    async def look(
        stub: ParkingServiceAsyncStub, channel: Any
    ) -> tuple[pb.ParkedApplication | None, list[intake.Event]]:
        async for one in _parked(stub, ""):
            if one.name == wanted:
                request = intake.ListEventsRequest(parent=one.name, page_size=1000)
                told = await IntakeServiceStub(channel).ListEvents(request, timeout=CALL_S)
                return one, list(told.events)
        return None, []

    one, events = _run(address, look, with_channel=True)
    console = person(json_)
    if one is None:
        complaints().print(f"[red]{escape(name)} is not parked[/]; `loanmesh get {escape(name)}` tells how it stands")
        raise typer.Exit(REFUSED)
    if json_:
        said = {**json_format.MessageToDict(one), "events": [json_format.MessageToDict(event) for event in events]}
        print_json(said)
        return
    _print_table(console, [one])
    for event in events:
        from loanmesh.cli.show import time_of

        details = ", ".join(f"{key}={value}" for key, value in sorted(event.details.items()) if value)
        console.print(f"  {time_of(event.event_time)}  {event.kind:<12} {escape(details)}")
    next_step(
        f"`loanmesh trace {short(one.name)}` shows where it broke; once that is mended"
        f' `loanmesh parked release {short(one.name)} --reason "what was mended"`'
    )


@commands.command()
def release(
    names: Annotated[
        list[str] | None, typer.Argument(help="Applications: lenders/NAME/applications/ID, or IDs alone.")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, e.g. what was mended; written into each history.")] = "",
    all_: Annotated[bool, typer.Option("--all", help="All that are parked, or all of --cause.")] = False,
    cause: Cause = "",
    actor: Actor = "",
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    json_: Json = False,
) -> None:
    """Set parked applications going again, with all their attempts before them.

    Example: `loanmesh parked release --all --cause scoring_error --reason "model 2026-12 rolled back"`
    """
    from loanmesh.runtime.clock import new_request_id

    if bool(names) == all_:
        raise typer.BadParameter("name applications, or say --all (with --cause for some)", param_hint="NAMES")
    if cause and not all_:
        raise typer.BadParameter("goes with --all", param_hint="--cause")
    if not reason.strip():
        raise typer.BadParameter("is written into the history: say it", param_hint="--reason")
    by = who(actor)
    named = [whole(name, lender) for name in names or ()]
    key = request_id or new_request_id()

    async def go(stub: ParkingServiceAsyncStub) -> list[pb.ReleaseApplicationsResponse.Result]:
        from lending.intake.v1 import parking_service_pb2 as pb

        # All names first: what is released may be parked again before the last page is read.
        chosen = named or [one.name for one in await _collect(_parked(stub, cause))]
        results: list[pb.ReleaseApplicationsResponse.Result] = []
        for start in range(0, len(chosen), A_CALL):
            request = pb.ReleaseApplicationsRequest(
                names=chosen[start : start + A_CALL], request_id=key, actor=by, reason=reason
            )
            results += (await stub.ReleaseApplications(request, timeout=CALL_S)).results
        return results

    results = _run(address, go)
    refused = [result for result in results if result.HasField("error")]
    if json_:
        for result in results:
            error = {"error": result.error.message} if result.HasField("error") else {}
            print_json({"name": result.name, "released": not error, **error})
    else:
        console = person(whole=True)
        for result in refused:
            console.print(f"[red]not released[/] {escape(result.name)}: {escape(result.error.message)}")
        console.print(f"[green]released {len(results) - len(refused)}[/] of {len(results)}")
        if len(results) > len(refused):
            next_step("`loanmesh parked list` in a minute or two: what breaks again is parked again")
        else:
            next_step("`loanmesh parked list` shows what is parked")
    if refused:
        raise typer.Exit(REFUSED)


async def _parked(stub: ParkingServiceAsyncStub, cause: str) -> AsyncIterator[pb.ParkedApplication]:
    from lending.intake.v1 import parking_service_pb2 as pb

    token = ""
    while True:
        request = pb.ListParkedApplicationsRequest(page_size=500, page_token=token, cause=cause)
        page = await stub.ListParkedApplications(request, timeout=CALL_S)
        for one in page.applications:
            yield one
        token = page.next_page_token
        if not token:
            return


async def _collect(found: AsyncIterator[T]) -> list[T]:
    return [one async for one in found]


def _run(address: str, ask: Callable[..., Coroutine[Any, Any, T] | Awaitable[T]], *, with_channel: bool = False) -> T:
    """Ask intake; ends with 3 where it does not answer, with 4 where it refuses."""
    import grpc
    from lending.intake.v1.parking_service_pb2_grpc import ParkingServiceStub

    async def work() -> T:
        async with connection.channel(await connection.intake(address)) as channel:
            stub = ParkingServiceStub(channel)
            return await (ask(stub, channel) if with_channel else ask(stub))

    console = complaints()
    where = address or "intake"
    try:
        return asyncio.run(work())
    except OSError as error:  # TLS is spoken, and it could not be asked who it is.
        console.print(f"[red]not reachable[/]: {where}: {escape(str(error))}; {IS_IT_UP}")
        raise typer.Exit(UNREACHABLE) from error
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            console.print(f"[red]not reachable[/]: {where}; {IS_IT_UP}")
            raise typer.Exit(UNREACHABLE) from error
        console.print(f"[red]refused[/] {error.code().name}: {escape(error.details() or '')}")
        raise typer.Exit(REFUSED) from error


def _print_table(console: Console, found: Sequence[pb.ParkedApplication]) -> None:
    from loanmesh.cli.show import table, time_of

    rows = [
        (one.name, one.stage, one.cause, one.error_type, one.faults, time_of(one.park_time), time_of(one.due_time),
         one.trace_id or "not traced")
        for one in found
    ]  # fmt: skip
    columns = ("application", "stage", "cause", "error", "faults", "parked", "due", "trace")
    console.print(table(f"{len(found)} parked", columns, rows))
