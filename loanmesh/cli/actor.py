"""Who gives an order, as it is written into logs and histories."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

Actor = Annotated[
    str, typer.Option(envvar="LOANMESH_ACTOR", help="Who orders it, for the log; else who is logged in here.")
]


def who(actor: str) -> str:
    """Who was named, else the login name of this process's user. Ends with 2 where it has none."""
    try:
        return actor.strip() or getpass.getuser()
    except (KeyError, OSError, ImportError) as error:  # A container's user without a line in /etc/passwd.
        raise typer.BadParameter(
            "say who orders it: nobody is logged in whose name could be taken", param_hint="--actor"
        ) from error
