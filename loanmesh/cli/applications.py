"""The commands about applications: submit, follow, list, explain, replay, accept. Thin, over the client library."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.answer import Json, complaints, next_step, person
from loanmesh.cli.application_name import DEMO_LENDER, Lender, Name, short, whole
from loanmesh.cli.codes import FAILED, USAGE
from loanmesh.cli.connection import Address
from loanmesh.cli.running import run

if TYPE_CHECKING:
    from lending.intake.v1 import intake_service_pb2 as pb
    from rich.console import Console

    from loanmesh.client import Client

PATIENCE_S = 5.0
"""How long a person at a prompt waits for a mesh that is away."""
T = TypeVar("T")


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    for command in (submit, example, get, watch, explain, replay, history, accept):
        app.command()(command)
    app.command("list")(list_)


def submit(
    file: Annotated[Path, typer.Argument(help="The application as JSON; - reads standard input.")],
    wait: Annotated[float, typer.Option(help="Seconds to wait for the decision, 0 to 60.", min=0, max=60)] = 10.0,
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """Submit one application and wait a little for its decision.

    Example: `loanmesh example person 7 > a.json && loanmesh submit a.json`
    """
    application = _read_application(file)

    async def work() -> pb.Application:
        async with connection.client(address, lender=lender, patience_s=PATIENCE_S) as client:
            return await client.submit(application, request_id=request_id, wait_s=wait)

    _tell_application(run(work()), json_)


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
    next_step("keep it in a file, e.g. by `> a.json`, and send it by `loanmesh submit a.json`", aside=True)


def get(name: Name, address: Address = "", lender: Lender = DEMO_LENDER, json_: Json = False) -> None:
    """Show one application.

    Example: `loanmesh get lenders/demo/applications/0192...`
    """
    _tell_application(_ask(address, lambda client: client.get(whole(name, lender))), json_)


def watch(name: Name, address: Address = "", lender: Lender = DEMO_LENDER, json_: Json = False) -> None:
    """Follow an application until it is decided.

    Example: `loanmesh watch lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    async def work() -> pb.Application | None:
        last = None
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            async for last in client.watch(whole(name, lender)):
                _tell(last, json_, show.application)
        return last

    last = run(work())
    if last is not None and not json_:
        next_step(after(last))


def list_(
    filter_: Annotated[str, typer.Option("--filter", help="e.g. 'state = DECIDED AND outcome = DECLINED'")] = "",
    limit: Annotated[int, typer.Option(help="At most this many.", min=1, max=1000)] = 20,
    order: Annotated[str, typer.Option(help="create_time or 'create_time desc'")] = "",
    page: Annotated[str, typer.Option(help="Token of the page before.")] = "",
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """List a lender's applications, newest first.

    Example: `loanmesh list --filter 'outcome = DECLINED' --limit 5`
    """
    from loanmesh.cli import show

    async def work() -> pb.ListApplicationsResponse:
        async with connection.client(address, lender=lender, patience_s=PATIENCE_S) as client:
            return await client.list(filter=filter_, order_by=order, page_size=limit, page_token=page)

    found = run(work())
    if json_:
        print(show.as_json(found))
        return
    if not found.applications:
        meant = f"of {lender} matches {filter_}" if filter_ else f"of {lender} is stored"
        person().print(f"no application {escape(meant)}")
        next_step(
            "`loanmesh list` shows all" if filter_ else "`loanmesh submit FILE` sends one, --lender names another"
        )
        return
    show.applications(person(), found.applications)
    if found.next_page_token:
        # Plain, so that it stays whole: it is to be copied.
        print(f"more: --page {found.next_page_token}")
    waits = any(show.state_of(one) == "PENDING" for one in found.applications)
    next_step("`loanmesh get NAME` shows one" + ("; `loanmesh why-failed` says why some wait" if waits else ""))


def explain(
    name: Name,
    schedules: Annotated[bool, typer.Option("--schedules", help="Add each offer's instalments.")] = False,
    language: Annotated[Literal["zh", "en", "both"], typer.Option(help="In which language.")] = "both",
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """Say why an application was decided so, with the sources.

    Example: `loanmesh explain lenders/demo/applications/0192... --schedules --language zh`
    """
    from loanmesh.cli import show

    application = whole(name, lender)
    found = _ask(address, lambda client: client.explain(application, schedules=schedules))
    _tell(found, json_, partial(show.explanation, language=language))
    if not json_:
        months = "" if schedules else "--schedules adds the instalments; "
        next_step(f"{months if found.decision.offers else ''}`loanmesh replay {short(application)}` decides once more")


def replay(name: Name, address: Address = "", lender: Lender = DEMO_LENDER, json_: Json = False) -> None:
    """Decide once more from the stored evidence, and say whether the same comes out. Ends with 1 where it does not.

    Example: `loanmesh replay lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    application = whole(name, lender)
    found = _ask(address, lambda client: client.replay(application))
    _tell(found, json_, show.replay)
    if not json_ and found.same:
        next_step(f"nothing; `loanmesh history {short(application)}` shows all that happened to it")
    elif not json_:
        next_step("has a model or policy been changed in place? docs/runbooks/bad-model-published.md")
    if not found.same:
        raise typer.Exit(FAILED)


def history(name: Name, address: Address = "", lender: Lender = DEMO_LENDER, json_: Json = False) -> None:
    """Show what happened to an application, and whether its record is intact.

    Example: `loanmesh history lenders/demo/applications/0192...`
    """
    from loanmesh.cli import show

    application = whole(name, lender)
    found = _ask(address, lambda client: client.history(application))
    _tell(found, json_, show.history)
    if json_:
        return
    id_ = short(application)
    if not found.chain_intact:
        next_step("somebody wrote into the database beside the mesh: find out who, and restore it from a copy")
    elif any(event.kind == "decided" for event in found.events):
        next_step(f"`loanmesh explain {id_}` says why; `loanmesh trace {id_}` shows each call")
    else:
        next_step(f"`loanmesh trace {id_}` shows each call; `loanmesh watch {id_}` waits for the end")


def accept(
    name: Name,
    offer: Annotated[str, typer.Argument(help="Which offer.")] = "offer-1",
    request_id: Annotated[str | None, typer.Option(help="Idempotency key; made when absent.")] = None,
    address: Address = "",
    lender: Lender = DEMO_LENDER,
    json_: Json = False,
) -> None:
    """Accept an offer.

    Example: `loanmesh accept lenders/demo/applications/0192... offer-1`
    """
    application = whole(name, lender)
    _tell_application(_ask(address, lambda client: client.accept(application, offer, request_id=request_id)), json_)


def after(application: pb.Application) -> str:
    """What a person may do next with an application, by where it stands."""
    from loanmesh.cli import show

    name = short(application.name)
    match show.state_of(application):
        case "PENDING":
            return f"`loanmesh watch {name}` waits for it; `loanmesh trace {name}` shows what it waits for"
        case "AWAITING_INFORMATION":
            return "supply what is missing before its time is up: Client.supply, docs/client.md"
        case "APPROVED" | "COUNTER_OFFER":
            offer = application.decision.offers[0].offer_id if application.decision.offers else "OFFER"
            return f"`loanmesh explain {name}` says why; `loanmesh accept {name} {offer}` takes the offer"
        case "DECLINED":
            return f"`loanmesh explain {name}` says why"
    return f"`loanmesh history {name}` shows all that happened to it"


def _ask(address: str, ask: Callable[[Client], Awaitable[T]]) -> T:
    """What one call of the client answers."""

    async def work() -> T:
        async with connection.client(address, patience_s=PATIENCE_S) as client:
            return await ask(client)

    return run(work())


def _read_application(path: Path) -> pb.Application:
    from loanmesh.cli.application_file import BadFile, read_application

    try:
        return read_application(path)
    except BadFile as error:
        complaints().print(f"[red]{escape(str(error))}[/]; nothing was sent")
        raise typer.Exit(USAGE) from error


def _tell_application(application: pb.Application, json_: bool) -> None:
    from loanmesh.cli import show

    _tell(application, json_, show.application)
    if not json_:
        next_step(after(application))


def _tell(message: Any, json_: bool, show_: Callable[[Console, Any], None]) -> None:
    from loanmesh.cli import show

    if json_:
        print(show.as_json(message), flush=True)
    else:
        show_(person(), message)
