"""How a command answers: JSON for machines; for a person words, and at their end what to do next.

Standard output is the machine's where it asked for JSON; a person is then told on standard error.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
NEXT = "next: "
"""Begins what to do next, everywhere."""


def person(json_: bool = False, *, whole: bool = False) -> Console:
    """Where a person reads what was found. Text is fitted to the terminal.

    whole  lines are left as they are instead: for what is to be copied, and holds no tables.
    """
    return Console(stderr=json_, highlight=False, soft_wrap=whole)


def complaints() -> Console:
    """Where a person reads what went wrong. Lines stay whole: names and paths in them are to be copied."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(answer: object) -> None:
    """One line of JSON, for machines."""
    print(json.dumps(answer, ensure_ascii=False), flush=True)


IS_IT_UP = "is the mesh up? `loanmesh up` starts one, --state or --address names another"
"""Said where nobody answers."""


def next_step(text: str, *, aside: bool = False) -> None:
    """What to do next, the last that a person is told: commands in backticks, whole, to be copied.

    aside  on standard error, where standard output goes into a file.
    """
    Console(stderr=aside, highlight=False, soft_wrap=True).print(NEXT + text, markup=False)
