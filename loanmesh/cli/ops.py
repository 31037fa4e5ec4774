"""The commands of an SRE: how processes are, whom they depend on, and pausing a dependency. Thin, over OpsService."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.folder import State, chosen

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message
    from lending.ops.v1 import ops_service_pb2 as pb
    from lending.ops.v1.ops_service_pb2_grpc import OpsServiceAsyncStub

UNREACHABLE, REFUSED = 3, 4
"""Exit codes, as everywhere in `loanmesh`."""
CALL_S = 3.0
"""How long a process may take to answer; it waits for nobody to do so."""
OVERRIDES = ("auto", "open", "closed")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a process, for machines.")]
Addresses = Annotated[
    list[str] | None,
    typer.Option("--address", help="A process to ask; may be repeated. Without it: all of the mesh that `up` runs."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    app.command()(status)
    app.command()(deps)
    app.command()(override)


def status(address: Addresses = None, state: State = Path(), json_: Json = False) -> None:
    """Show how each process is: loop lag, queues, backlog, and what it does without.

    Example: `loanmesh status --address 127.0.0.1:7401 --json`
    """
    from lending.ops.v1 import ops_service_pb2 as pb

    _show(address, state, json_, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_S), _print_status)


def deps(address: Addresses = None, state: State = Path(), json_: Json = False) -> None:
    """Show whom each process depends on: breakers, bulkheads, calls and failures.

    Example: `loanmesh deps --address 127.0.0.1:7402`
    """
    from lending.ops.v1 import ops_service_pb2 as pb

    def ask(stub: OpsServiceAsyncStub) -> Awaitable[Message]:
        return stub.ListDependencies(pb.ListDependenciesRequest(), timeout=CALL_S)

    _show(address, state, json_, ask, _print_dependencies)


def override(
    dependency: Annotated[str, typer.Argument(help="Its name as `deps` shows it, e.g. court.")],
    to: Annotated[str, typer.Argument(help="open: pause it; closed: let all calls pass; auto: by the rules again.")],
    actor: Annotated[str, typer.Option(envvar=["LOANMESH_ACTOR", "USER"], help="Who orders it.")],
    reason: Annotated[str, typer.Option(help="Why, for the log.")] = "",
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(help="A process; may be repeated. Without it: all that depend on it, of the mesh that `up` runs."),
    ] = None,
    state: State = Path(),
    json_: Json = False,
) -> None:
    """Pause a dependency, let everything through to it, or give it back to its rules.

    Example: `loanmesh override court open --reason "maintenance until 14:00"`
    """
    from lending.ops.v1 import ops_service_pb2 as pb

    from loanmesh.runtime.clock import new_request_id

    if to not in OVERRIDES:
        raise typer.BadParameter(f"must be one of {', '.join(OVERRIDES)}", param_hint="TO")
    values = (pb.OVERRIDE_AUTOMATIC, pb.OVERRIDE_FORCED_OPEN, pb.OVERRIDE_FORCED_CLOSED)
    order = pb.OverrideDependencyRequest(
        name=f"dependencies/{dependency}",
        request_id=request_id or new_request_id(),
        override=dict(zip(OVERRIDES, values, strict=True))[to],
        actor=actor,
        reason=reason,
    )

    def show(console: Console, answer: pb.OverrideDependencyResponse) -> None:
        _print_dependencies(console, pb.ListDependenciesResponse(dependencies=[answer.dependency]))

    _show(address, state, json_, lambda stub: stub.OverrideDependency(order, timeout=CALL_S), show, only_who_knows=True)
    if not json_:
        undo = "" if to == "auto" else f"`loanmesh override {dependency} auto` gives it back to its rules; "
        Console(highlight=False).print(f"next: {undo}`loanmesh deps` shows how it goes")


def _show(
    addresses: Sequence[str] | None,
    state: Path,
    json_: bool,
    ask: Callable[[OpsServiceAsyncStub], Awaitable[Message]],
    show: Callable[[Console, Any], None],
    *,
    only_who_knows: bool = False,
) -> None:
    """Ask all at once and show each answer; ends with 3 where one did not answer, with 4 where one refused.

    only_who_knows  where no process was named, leave out those that know nothing of what is asked for, unless all do.
    """
    import grpc
    from google.protobuf import json_format

    from loanmesh.cli import processes

    folder = chosen(state)
    asked = list(addresses) if addresses else asyncio.run(processes.replicas(folder))
    answers = dict(zip(asked, asyncio.run(_ask_all(asked, ask)), strict=True))
    if only_who_knows and not addresses:
        unknown = {one for one, said in answers.items() if _is_unknown(said)}
        answers = {one: said for one, said in answers.items() if one not in unknown} or answers
    console = Console(stderr=json_, highlight=False)
    code = 0
    for address, answer in answers.items():
        if not isinstance(answer, grpc.aio.AioRpcError):
            if json_:
                said = json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)
                print(json.dumps({"address": address, **said}, ensure_ascii=False))
            else:
                console.print(f"[bold]{address}[/]")
                show(console, answer)
        elif answer.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            details = answer.details() or ""
            hint = details if details.startswith("tls_") else "is the mesh up? --state or --address names it"
            console.print(f"[bold]{address}[/]  [red]not reachable[/]; {escape(hint)}")
            code = code or UNREACHABLE
        else:
            console.print(f"[bold]{address}[/]  [red]refused[/] {answer.code().name}: {escape(answer.details() or '')}")
            code = REFUSED
    if code:
        raise typer.Exit(code)


def _is_unknown(answer: Message | grpc.aio.AioRpcError) -> bool:
    import grpc

    return isinstance(answer, grpc.aio.AioRpcError) and answer.code() == grpc.StatusCode.NOT_FOUND


async def _ask_all(
    addresses: Sequence[str], ask: Callable[[OpsServiceAsyncStub], Awaitable[Message]]
) -> list[Message | grpc.aio.AioRpcError]:
    import grpc
    from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub

    async def one(address: str) -> Message | grpc.aio.AioRpcError:
        try:
            async with connection.channel(address) as channel:
                return await ask(OpsServiceStub(channel))
        except grpc.aio.AioRpcError as error:
            return await connection.explained(error)

    return list(await asyncio.gather(*(one(address) for address in addresses)))


def _print_status(console: Console, answer: pb.GetStatusResponse) -> None:
    from loanmesh.cli.show import time_of

    leaving = "  [yellow]draining[/]" if answer.draining else ""
    console.print(f"  {answer.service}  {answer.instance}  since {time_of(answer.start_time)}{leaving}")
    console.print(
        f"  loop lag   {answer.loop_lag_ms:.1f} ms, at most {answer.loop_lag_max_ms:.1f} ms in the last minute"
    )
    for queue in answer.queues:
        console.print(f"  queue      {queue.name} {queue.length} of {queue.limit}")
    if answer.HasField("backlog"):
        console.print(f"  backlog    {answer.backlog} applications")
    for step in answer.degradations:
        console.print(
            f"  [yellow]without[/]    {step.step} {step.subject} since {time_of(step.start_time)}: {escape(step.cause)}"
        )


def _print_dependencies(console: Console, answer: pb.ListDependenciesResponse) -> None:
    from loanmesh.cli.show import table, time_of

    rows = [_row(dependency, time_of) for dependency in answer.dependencies]
    if rows:
        columns = ("dependency", "breaker", "since", "in use", "waiting", "calls", "failed", "busy", "refused", "cause")
        console.print(table("", columns, rows))
    else:
        console.print("  depends on nobody")


def _row(one: pb.Dependency, time_of: Callable[[Any], str]) -> tuple[object, ...]:
    from lending.ops.v1 import ops_service_pb2 as pb

    state = pb.BreakerState.Name(one.breaker_state).removeprefix("BREAKER_STATE_").lower()
    colour = {"closed": "green", "half_open": "yellow"}.get(state, "red")
    return (
        one.name.removeprefix("dependencies/"),
        f"[{colour}]{state}[/]",
        time_of(one.breaker_change_time),
        f"{one.in_use}/{one.in_use_limit}",
        f"{one.waiting}/{one.waiting_limit}",
        one.calls,
        one.failures,
        one.overloads,
        one.refusals,
        escape(one.breaker_cause),
    )
