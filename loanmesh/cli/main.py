"""The `loanmesh` command: thin, over the client library. Each module beside this one adds its commands.

Exit codes: 0 done, 1 failed, 2 wrong usage, file or setting, 3 mesh not reachable, 4 refused, 130 interrupted.
"""

from __future__ import annotations

from typing import Annotated

import typer

from loanmesh import __version__
from loanmesh.cli import (
    applications,
    certs,
    connection,
    decide_firms,
    erase,
    keys,
    knobs,
    ops,
    parked,
    promotion,
    serve,
    source,
    top,
    trace,
    up,
    why_failed,
)
from loanmesh.cli.answer import complaints
from loanmesh.cli.codes import USAGE

app = connection.App(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Decides loan applications. Start with `loanmesh demo`, or `loanmesh up` and `loanmesh submit FILE`.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"loanmesh {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    del version


_COMMANDS = (
    up, applications, decide_firms, ops, top, why_failed, trace, source, parked, promotion, knobs, keys, certs, erase,
    serve,
)  # fmt: skip
for part in _COMMANDS:
    part.register(app)


def main() -> None:
    """Run the command."""
    try:
        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lab":
            raise
        # The image of the services has no laboratory in it.
        complaints().print("this command needs the laboratory, which is not installed here: run it in a checkout")
        raise SystemExit(USAGE) from error


if __name__ == "__main__":
    main()
