"""`loanmesh erase`: forget a person or firm who asks, and say what must be kept. Thin, over ErasureService."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli import connection
from loanmesh.cli.actor import Actor, who
from loanmesh.cli.answer import IS_IT_UP, Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import REFUSED, UNREACHABLE
from loanmesh.cli.connection import Address

if TYPE_CHECKING:
    from lending.intake.v1 import erasure_service_pb2 as pb

CALL_S = 30.0


def register(app: typer.Typer) -> None:
    """Add the command to the `loanmesh` command."""
    app.command()(erase)


def erase(
    subject_file: Annotated[
        Path, typer.Option(help="File with the identity number and nothing else; - reads standard input.")
    ],
    lender: Annotated[str, typer.Option(envvar="LOANMESH_LENDER", help="The lender, lenders/NAME.")],
    actor: Actor = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be erased.")] = False,
    address: Address = "",
    json_: Json = False,
) -> None:
    """Erase what is kept of a person or firm, and say what must be kept, until when and by which rule.

    The number is read from a file, never taken as an argument: arguments are seen by everybody on the machine.

    Example: `loanmesh erase --lender lenders/demo --subject-file subject.txt --actor dpo@example.org --dry-run`
    """
    import grpc
    from google.protobuf import json_format

    number = _number(subject_file)
    by = who(actor)
    complain = complaints()
    try:
        answer = asyncio.run(_ask(address, lender, number, by, dry_run))
    except grpc.aio.AioRpcError as error:
        away = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        word = "not reachable" if away else f"refused {error.code().name}"
        then = IS_IT_UP if away else "nothing is lost by asking again"
        complain.print(f"[red]{word}[/]: {escape(error.details() or '')}; {then}")
        raise typer.Exit(UNREACHABLE if away else REFUSED) from None
    if json_:
        print_json(json_format.MessageToDict(answer, always_print_fields_with_no_presence=True))
    else:
        _show(person(whole=True), answer, dry_run)
        next_step(_then(answer, dry_run))


def _number(file: Path) -> str:
    from loanmesh.runtime.identity import valid_credit_code, valid_resident_id

    try:
        said = sys.stdin.read(100) if str(file) == "-" else file.read_text(encoding="utf-8")[:100]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot be read: {type(error).__name__}", param_hint="--subject-file") from None
    number = said.strip().upper()
    if not valid_resident_id(number) and not valid_credit_code(number):
        raise typer.BadParameter(
            "must hold one resident identity number or unified social credit code; its check character must fit",
            param_hint="--subject-file",
        )
    return number


async def _ask(address: str, lender: str, number: str, actor: str, dry_run: bool) -> pb.EraseSubjectResponse:
    from lending.intake.v1 import erasure_service_pb2 as pb
    from lending.intake.v1.erasure_service_pb2_grpc import ErasureServiceStub
    from lending.type.v1.party_pb2 import Identity

    from loanmesh.runtime.identity import valid_resident_id

    person = valid_resident_id(number)
    kind = Identity.KIND_RESIDENT_ID if person else Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE
    request = pb.EraseSubjectRequest(
        parent=lender, identity=Identity(kind=kind, value=number), actor=actor, validate_only=dry_run
    )
    async with connection.channel(await connection.intake(address)) as open_:
        answer: pb.EraseSubjectResponse = await ErasureServiceStub(open_).EraseSubject(request, timeout=CALL_S)
        return answer


def _show(console: Console, answer: pb.EraseSubjectResponse, dry_run: bool) -> None:
    from lending.intake.v1 import erasure_service_pb2 as pb

    from loanmesh.cli.show import time_of

    would = "would be " if dry_run else ""
    for one in answer.applications:
        if one.outcome == pb.EraseSubjectResponse.OUTCOME_KEPT:
            until = f" until {time_of(one.keep_until_time)}" if one.HasField("keep_until_time") else ""
            console.print(f"{one.name}  [yellow]kept[/]{until}: {escape(one.because)} ({one.rule})")
        else:
            before = " before" if one.outcome == pb.EraseSubjectResponse.OUTCOME_ERASED_BEFORE else ""
            console.print(f"{one.name}  [green]{would}erased[/]{before}")
    if not answer.applications:
        console.print("no application of this subject is kept")
    console.print(f"{answer.answers_erased} cached answers of sources {would}erased")


def _then(answer: pb.EraseSubjectResponse, dry_run: bool) -> str:
    from lending.intake.v1 import erasure_service_pb2 as pb

    if dry_run:
        return f"nothing was changed{', and there may be more' if answer.more else ''}; without --dry-run it is"
    if answer.more:
        return "there may be more: run the same command again"
    if any(one.outcome == pb.EraseSubjectResponse.OUTCOME_KEPT for one in answer.applications):
        return "tell who asked what is kept, until when and by which rule; docs/privacy.md"
    return "nothing; tell who asked that it is done"
