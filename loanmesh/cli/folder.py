"""Where `up` keeps what it keeps, and how a command is told of another place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

State = Annotated[
    Path,
    typer.Option(
        envvar="LOANMESH_STATE", help="Folder of the mesh that `up` runs: its databases and logs.", show_default=False
    ),
]


def default_state() -> Path:
    """The folder where nothing else is said."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "loanmesh"


def chosen(state: Path) -> Path:
    """The folder that was named; the default one where none was."""
    return default_state() if state == Path() else state
