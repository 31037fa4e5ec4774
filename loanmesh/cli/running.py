"""Run what a command does to its end; what went wrong becomes one line for a person, and an exit code."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import typer
from rich.markup import escape

from loanmesh.cli.answer import IS_IT_UP, complaints, next_step
from loanmesh.cli.codes import INTERRUPTED, REFUSED, UNREACHABLE

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Ends with 3 where the mesh is away or too busy, with 4 where it refuses, with 130 by
    Ctrl-C."""
    from loanmesh.client import CallFailed, Overloaded, TlsFailed, Unreachable

    complain = complaints()
    try:
        return asyncio.run(work)
    except CallFailed as error:
        complain.print(f"[red]refused[/] {error.code}: {escape(str(error))}")
        for field, rule in error.violations:
            complain.print(f"  {escape(field)}: {escape(rule)}")
        if error.code == "NOT_FOUND":
            next_step("`loanmesh list` shows what there is, --lender names another lender", aside=True)
        raise typer.Exit(REFUSED) from error
    except Overloaded as error:
        complain.print(f"[red]too busy[/]: {escape(str(error))}; send it again with the same --request-id")
        raise typer.Exit(UNREACHABLE) from error
    except TlsFailed as error:
        complain.print(
            f"[red]not reachable[/] ({error.error_type}): {escape(str(error))}; --tls-ca, --tls-cert and --tls-key name"
            " our files, `loanmesh certs show` tells how they are"
        )
        raise typer.Exit(UNREACHABLE) from error
    except Unreachable as error:
        complain.print(f"[red]not reachable[/]: {escape(str(error))}; {IS_IT_UP}")
        raise typer.Exit(UNREACHABLE) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
