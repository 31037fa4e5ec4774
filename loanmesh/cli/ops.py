"""The commands of an SRE: how processes are, whom they depend on, and pausing a dependency. Thin, over OpsService."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.actor import Actor, who
from loanmesh.cli.answer import IS_IT_UP, Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import REFUSED, UNREACHABLE
from loanmesh.cli.folder import State, chosen

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message
    from lending.ops.v1 import ops_service_pb2 as pb
    from lending.ops.v1.ops_service_pb2_grpc import OpsServiceAsyncStub

CALL_S = 3.0
"""How long a process may take to answer; it waits for nobody to do so."""
OVERRIDES = ("auto", "open", "closed")
NEVER_CHANGED = "new"
"""The cause of a breaker that is as it was when its process started."""
_COLOURS = {"closed": "green", "half_open": "yellow"}
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
    """Show how each process is: loop lag, queues, backlog, what rests until when, and what it does without.

    Example: `loanmesh status --address 127.0.0.1:7401 --json`
    """
    from lending.ops.v1 import ops_service_pb2 as pb

    def ask(stub: OpsServiceAsyncStub) -> Awaitable[Message]:
        return stub.GetStatus(pb.GetStatusRequest(), timeout=CALL_S)

    _show(address, state, json_, ask, _print_status, _after_status)


def deps(address: Addresses = None, state: State = Path(), json_: Json = False) -> None:
    """Show whom each process depends on: breakers, bulkheads, calls and failures.

    in use, waiting: calls now, of how many may be. Since the process started, of all calls: failed; busy, turned away
    by the other side; refused, not made, as the breaker was open or the room full.

    Example: `loanmesh deps --address 127.0.0.1:7402`
    """
    from lending.ops.v1 import ops_service_pb2 as pb

    def ask(stub: OpsServiceAsyncStub) -> Awaitable[Message]:
        return stub.ListDependencies(pb.ListDependenciesRequest(), timeout=CALL_S)

    _show(address, state, json_, ask, _print_dependencies, _after_dependencies)


def override(
    dependency: Annotated[str, typer.Argument(help="Its name as `deps` shows it, e.g. court.")],
    to: Annotated[str, typer.Argument(help="open: pause it; closed: let all calls pass; auto: by the rules again.")],
    actor: Actor = "",
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
        actor=who(actor),
        reason=reason,
    )

    def show(console: Console, answer: pb.OverrideDependencyResponse) -> None:
        _print_dependencies(console, pb.ListDependenciesResponse(dependencies=[answer.dependency]))

    def ask(stub: OpsServiceAsyncStub) -> Awaitable[Message]:
        return stub.OverrideDependency(order, timeout=CALL_S)

    undo = "" if to == "auto" else f"`loanmesh override {dependency} auto` gives it back to its rules; "
    then = f"{undo}`loanmesh deps` shows how it goes"
    _show(address, state, json_, ask, show, lambda _: then, only_who_knows=True)


def _show(
    addresses: Sequence[str] | None,
    state: Path,
    json_: bool,
    ask: Callable[[OpsServiceAsyncStub], Awaitable[Message]],
    show: Callable[[Console, Any], None],
    then: Callable[[Sequence[Any]], str],
    *,
    only_who_knows: bool = False,
) -> None:
    """Ask all at once and show each answer; ends with 3 where one did not answer, with 4 where one refused.

    then            what to do next, by all answers.
    only_who_knows  where no process was named, leave out those that know nothing of what is asked for, unless all do.
    """
    import grpc
    from google.protobuf import json_format

    from loanmesh.cli import processes

    folder = chosen(state)
    asked = dict.fromkeys(addresses, "") if addresses else asyncio.run(processes.replicas(folder))
    answers = dict(zip(asked, asyncio.run(_ask_all(list(asked), ask)), strict=True))
    if only_who_knows and not addresses:
        unknown = {one for one, said in answers.items() if _is_unknown(said)}
        answers = {one: said for one, said in answers.items() if one not in unknown} or answers
    console = person(json_)
    code = 0
    answered = []
    for address, answer in answers.items():
        title = f"[bold]{address}[/]  {asked[address]}".rstrip()
        if not isinstance(answer, grpc.aio.AioRpcError):
            answered.append(answer)
            if json_:
                said = json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)
                print_json({"address": address, **said})
            else:
                console.print(title)
                show(console, answer)
        elif answer.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            details = answer.details() or ""
            why = f"; {details}" if details.startswith("tls_") else ""
            console.print(f"{title}  [red]not reachable[/]{escape(why)}")
            code = code or UNREACHABLE
        else:
            console.print(f"{title}  [red]refused[/] {answer.code().name}: {escape(answer.details() or '')}")
            code = REFUSED
    if answered and not json_:
        next_step(then(answered))
    if code == UNREACHABLE:
        complaints().print(IS_IT_UP)
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
    console.print(f"  process    {answer.instance}  since {time_of(answer.start_time)}{leaving}")
    console.print(
        f"  loop lag   {answer.loop_lag_ms:.1f} ms, at most {answer.loop_lag_max_ms:.1f} ms in the last minute"
    )
    for queue in answer.queues:
        console.print(f"  queue      {queue.name} {queue.length} of {queue.limit}")
    if answer.HasField("backlog"):
        console.print(f"  backlog    {answer.backlog} due now")
    for rest in answer.resting:
        console.print(
            f"  [yellow]resting[/]    {rest.applications} wait for {escape(rest.waiting_for)}, tried again from"
            f" {time_of(rest.retry_time)} on"
        )
    for step in answer.degradations:
        console.print(
            f"  [yellow]without[/]    {step.step} {step.subject} since {time_of(step.start_time)}: {escape(step.cause)}"
        )


def _after_status(answers: Sequence[pb.GetStatusResponse]) -> str:
    if any(one.backlog or one.resting or one.degradations for one in answers):
        return "`loanmesh why-failed --since 10m` says what they wait for; `loanmesh deps` shows the breakers"
    return "nothing waits; `loanmesh top` shows the traffic live, `loanmesh deps` whom each process depends on"


def _print_dependencies(console: Console, answer: pb.ListDependenciesResponse) -> None:
    from loanmesh.cli.show import table

    if not answer.dependencies:
        console.print("  depends on nobody")
        return
    columns = ("  dependency", "breaker", "in use", "waiting", "calls", "failed", "busy", "refused")
    console.print(table("", columns, [_row(one) for one in answer.dependencies], words=2))
    for one in answer.dependencies:
        if one.breaker_cause != NEVER_CHANGED:
            console.print(f"  {_id(one)}: {_breaker_words(one)}")


def _row(one: pb.Dependency) -> tuple[object, ...]:
    state = _breaker(one)
    return (
        f"  {_id(one)}",
        f"[{_COLOURS.get(state, 'red')}]{state}[/]",
        f"{one.in_use}/{one.in_use_limit}",
        f"{one.waiting}/{one.waiting_limit}",
        one.calls,
        one.failures,
        one.overloads,
        one.refusals,
    )


def _breaker_words(one: pb.Dependency) -> str:
    """State, since when, why, and when a call has a chance again."""
    from loanmesh.cli.show import time_of

    again = f"; tried again at {time_of(one.retry_time)}" if one.HasField("retry_time") else ""
    return f"{_breaker(one)} since {time_of(one.breaker_change_time)}: {escape(one.breaker_cause)}{again}"


def _after_dependencies(answers: Sequence[pb.ListDependenciesResponse]) -> str:
    from lending.ops.v1 import ops_service_pb2 as pb

    every = [one for answer in answers for one in answer.dependencies]
    for one in every:
        if _breaker(one).startswith("forced"):
            return f"`loanmesh override {_id(one)} auto` gives {_id(one)} back to its rules, once it is well"
    for one in every:
        if _breaker(one) != "closed":
            page = "bureau-down" if one.kind == pb.Dependency.KIND_SOURCE else "hop-failing"
            return f"`loanmesh why-failed --since 10m` shows who waits for {_id(one)}; docs/runbooks/{page}.md"
    return "all breakers let calls through; `loanmesh top` shows the traffic live"


def _id(one: pb.Dependency) -> str:
    return one.name.removeprefix("dependencies/")


def _breaker(one: pb.Dependency) -> str:
    from lending.ops.v1 import ops_service_pb2 as pb

    return pb.BreakerState.Name(one.breaker_state).removeprefix("BREAKER_STATE_").lower()
