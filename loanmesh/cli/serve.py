"""`loanmesh serve` and `loanmesh migrate`: what a container runs, one service by its name."""

from __future__ import annotations

import importlib
from typing import Annotated

import typer

from loanmesh.cli.answer import complaints, next_step
from loanmesh.runtime.setting_file import SECTIONS

WITH_TABLES = ("intake", "bureau")


def serve(service: Annotated[str, typer.Argument(help="intake, bureau, scoring or pricing")]) -> None:
    """Run one service in this process until SIGTERM; settings come from the environment.

    Example: `PRICING_SERVER__LISTEN=0.0.0.0:7404 loanmesh serve pricing`
    """
    if service not in SECTIONS:
        raise typer.BadParameter(f"must be one of {', '.join(SECTIONS)}")
    importlib.import_module(f"services.{service}.main").main()


def migrate(service: Annotated[str, typer.Argument(help="intake or bureau")]) -> None:
    """Bring the tables of a service up to date and end: once a release, before its replicas start. May be repeated.

    Example: `loanmesh migrate intake`
    """
    from loanmesh.runtime.migrations import upgrade
    from loanmesh.runtime.opening import opening
    from loanmesh.runtime.setting_rules import refusing
    from loanmesh.runtime.settings import load
    from services.bureau.settings import BureauSettings
    from services.intake.settings import IntakeSettings

    if service not in WITH_TABLES:
        raise typer.BadParameter(f"must be one of {', '.join(WITH_TABLES)}; the others keep no tables")
    with refusing():
        settings = load(IntakeSettings) if service == "intake" else load(BureauSettings)
        url = settings.database_url.get_secret_value()
        with opening(f"{service.upper()}_DATABASE_URL", url):
            upgrade(url, f"services.{service}")
    complaints().print(f"{service}: tables are up to date; its replicas may start")
    next_step(f"`loanmesh serve {service}` starts one", aside=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(serve)
    app.command()(migrate)
