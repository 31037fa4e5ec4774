"""An application's name as a person gives it: whole, or its id alone, of the lender that is meant."""

from __future__ import annotations

import os
import re
from typing import Annotated

import typer

DEMO_LENDER = "lenders/demo"
Lender = Annotated[str, typer.Option(envvar="LOANMESH_LENDER", help="The lender, lenders/NAME; of an id alone, whose.")]
Name = Annotated[str, typer.Argument(help="The application: lenders/NAME/applications/ID, or its ID alone.")]
_NAME = re.compile(r"(?:(lenders/[^/]+)/)?(?:applications/)?([0-9a-f-]{36})")


def whole(name: str, lender: str) -> str:
    """`lenders/NAME/applications/ID`. Ends with 2 where it is neither that nor an id."""
    found = _NAME.fullmatch(name.strip())
    if found is None:
        raise typer.BadParameter(
            f"must be lenders/NAME/applications/ID, or an ID of 36 digits, not {name!r}; `loanmesh list` shows them",
            param_hint="NAME",
        )
    return f"{found[1] or lender}/applications/{found[2]}"


def short(name: str) -> str:
    """The id alone where that is enough to be found by a command run here without --lender, else the whole name."""
    usual = os.environ.get("LOANMESH_LENDER") or DEMO_LENDER
    return name.removeprefix(f"{usual}/applications/")
