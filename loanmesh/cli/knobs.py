"""`loanmesh settings SERVICE`: every knob with the value in force."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loanmesh.cli.answer import Json, next_step, person, print_json
from loanmesh.runtime.knobs import knobs
from loanmesh.runtime.setting_file import SECTIONS
from loanmesh.runtime.settings import ServiceSettings, load, prefix_of


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(settings)


def settings(
    service: Annotated[str, typer.Argument(help="intake, bureau, scoring or pricing")],
    json_: Json = False,
) -> None:
    """Print every setting of a service as a start from here would read it: name, value, what it does. Secrets masked.

    Example: `loanmesh settings intake`
    """
    if service not in SECTIONS:
        raise typer.BadParameter(f"must be one of {', '.join(SECTIONS)}")
    lines = in_force(service)
    if json_:
        print_json([asdict(line) for line in lines])
        return
    show(person(), lines)
    next_step(f"set what you mean to change in the environment, e.g. `export {lines[0].name}=...`, and start it again")


@dataclass(frozen=True)
class Line:
    """One knob as it stands."""

    name: str
    value: Any
    default: Any
    allowed: str
    doc: str


def in_force(service: str) -> list[Line]:
    """The knobs of a service, secrets masked. Ends the process with 2 where one is wrong, as a start would."""
    class_ = settings_class(service)
    settings, unset = load(class_), class_.model_construct()
    return [
        Line(knob.name, knob.value(settings), knob.value(unset), knob.allowed, knob.doc)
        for knob in knobs(class_, prefix_of(class_))
    ]


def show(console: Console, lines: list[Line]) -> None:
    """Name and value, then what it does; values that are not the default stand out. Names are never cut."""
    for line in lines:
        value = f"[bold]{escape(str(line.value))}[/] (default {escape(str(line.default))})"
        console.print(
            f"{line.name} = {value if line.value != line.default else escape(str(line.value))}", soft_wrap=True
        )
        console.print(f"    [dim]{escape(line.doc)} Allowed: {escape(line.allowed)}.[/]", soft_wrap=True)


def settings_class(service: str) -> type[ServiceSettings]:
    """The settings of a service."""
    from services.bureau.settings import BureauSettings
    from services.intake.settings import IntakeSettings
    from services.pricing.settings import PricingSettings
    from services.scoring.settings import ScoringSettings

    classes: dict[str, type[ServiceSettings]] = {
        "intake": IntakeSettings, "bureau": BureauSettings, "scoring": ScoringSettings, "pricing": PricingSettings,
    }  # fmt: skip
    return classes[service]
