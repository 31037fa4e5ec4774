"""`loanmesh promotion`: plan a promotion, live through it beforehand, and what a replica does. Thin."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import FAILED, USAGE

if TYPE_CHECKING:
    from loanmesh.promotion.capacity import Capacity
    from loanmesh.promotion.file import Promotion
    from loanmesh.promotion.plan import Plan
    from loanmesh.promotion.simulate import Replayed

OVERLAY = "deploy/k8s/overlays/promotion"
promotion_app = typer.Typer(
    no_args_is_help=True,
    help="Plan a promotion from a file: replicas, connections, what bounds; and try it beforehand.",
)
File = Annotated[Path, typer.Argument(help="The promotion, e.g. deploy/promotions/double-twelve.yaml.")]
CapacityFile = Annotated[
    Path | None, typer.Option("--capacity", help="What a replica does, as `promotion capacity` writes it.")
]
Scale = Annotated[float, typer.Option(help="Multiplies all arrivals that the file expects.", min=0.001, max=100_000)]
QuotaOption = Annotated[
    list[str] | None, typer.Option("--quota", help="As if SOURCE granted so many queries a second: tax=2000.")
]


class ScalingWord(StrEnum):
    """How replicas follow the load."""

    KEDA = "keda"
    HPA = "hpa"
    NONE = "none"


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    app.add_typer(promotion_app, name="promotion")


@promotion_app.command()
def plan(
    file: File,
    out: Annotated[Path | None, typer.Option(help="Folder to write the kustomize component into.")] = None,
    scale: Scale = 1.0,
    quota: QuotaOption = None,
    capacity: CapacityFile = None,
    json_: Json = False,
) -> None:
    """Compute replicas of every service and database connections, and say what bounds. Ends with 1 where a target is
    missed.

    Example: `loanmesh promotion plan deploy/promotions/double-twelve.yaml --out deploy/k8s/overlays/promotion/plan`
    """
    console = person(json_, whole=True)
    with _usable(console):
        promotion, made = _plan(file, scale, quota, capacity)
    written = _write(console, out, promotion, made, file) if out else None
    if json_:
        print_json({"holds": made.holds, **_plain(made), "written": str(written) if written else None})
    _say_plan(console, promotion, made)
    if made.holds:
        console.print(f"[green]the plan holds[/]: 99 of 100 are decided within {_seconds(made.decided_within_s)}")
    for problem in made.problems:
        console.print(f"[red]does not hold[/]: {problem.what}\n  {problem.do}")
    if written:
        console.print(f"wrote {escape(str(written))}")
    if not json_:
        next_step(_next_after_plan(file, written, promotion, made))
    if not made.holds:
        raise typer.Exit(FAILED)


@promotion_app.command()
def simulate(
    file: File,
    scale: Scale = 1.0,
    quota: QuotaOption = None,
    scaling: Annotated[
        ScalingWord, typer.Option(help="keda: by backlog, planned floor by the clock; hpa: by CPU; none: as planned.")
    ] = ScalingWord.KEDA,
    planned: Annotated[
        bool,
        typer.Option(
            "--planned/--unplanned", help="Unplanned: nobody applied the plan; what would autoscalers make of it alone?"
        ),
    ] = True,
    picture: Annotated[Path | None, typer.Option(help="Draw backlog, replicas and time to decision: out.svg.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals and boot times.", min=0)] = 1,
    capacity: CapacityFile = None,
    json_: Json = False,
) -> None:
    """Live through the promotion, planned as `promotion plan` does, with pods that boot and autoscalers that look.

    Ends with 1 where the plan does not hold.

    Example: `loanmesh promotion simulate deploy/promotions/double-twelve.yaml --scale 100 --picture day.svg`
    """
    console = person(json_, whole=True)
    try:
        from loanmesh.promotion.simulate import replay

        if picture:
            import matplotlib  # noqa: F401  Before the work, not after it.

            _check_picture(console, picture)
    except ImportError as error:
        console.print(f"[red]needs {error.name}[/], which is not installed: pip install 'loanmesh\\[lab]'")
        raise typer.Exit(FAILED) from error
    with _usable(console):
        promotion, made = _plan(file, scale, quota, capacity)
        known = _capacity(capacity)
        quotas = _quotas(quota, promotion)
    replayed = replay(
        promotion, known, made, scale=scale, quotas=quotas, scaling=scaling.value, seed=seed, planned=planned
    )
    how = f"{scaling.value}, {'' if planned else 'un'}planned"
    if picture:
        _draw(console, picture, promotion, replayed, how)
    if json_:
        print_json(_replayed_as_json(promotion, made, replayed))
    _say_replayed(console, promotion, made, replayed, how)
    if picture:
        console.print(f"drawn: {escape(str(picture))}")
    for problem in replayed.problems:
        console.print(f"[red]does not hold[/]: {problem}")
    if not json_:
        next_step(_next_after_replay(file, promotion, made, replayed, scale, planned))
    if not replayed.holds:
        raise typer.Exit(FAILED)


@promotion_app.command()
def capacity(
    bench: Annotated[Path, typer.Argument(help="build/bench.json, as `make bench ONLY=core` writes it.")],
    out: Annotated[Path | None, typer.Option(help="File to write instead of printing.")] = None,
    json_: Json = False,
) -> None:
    """Say what one replica of each service does, from a benchmark of this machine.

    Example: `loanmesh promotion capacity build/bench.json --out capacity.yaml`
    """
    from loanmesh.promotion.capacity import SERVICES, as_yaml, from_bench

    console = complaints()
    with _usable(console):
        found = from_bench(bench)
    text = as_yaml(found)
    if out:
        _write_text(console, out, text)
    if json_:
        print(found.model_dump_json())
    elif not out:
        print(text, end="")
    rates = ", ".join(f"{name} {found.a_second(name, 1.0):,.0f}" for name in SERVICES)
    console.print(f"one replica, a second, cold: {rates}")
    if not json_:
        next_step(
            f"`loanmesh promotion plan FILE --capacity {out or 'CAPACITY.yaml'}`; and the same figures for KEDA's"
            " scaler: `loanmesh settings intake` shows INTAKE_SCALER__*",
            aside=True,
        )


# --- Reading ---


@contextmanager
def _usable(console: Console) -> Iterator[None]:
    """Ends with 2 where a file or option cannot be used."""
    from loanmesh.promotion.wrong import WrongFile

    try:
        yield
    except WrongFile as error:
        console.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(USAGE) from error


def _capacity(path: Path | None) -> Capacity:
    from loanmesh.promotion.capacity import read_capacity

    return read_capacity(path)


def _plan(file: Path, scale: float, quota: Sequence[str] | None, capacity: Path | None) -> tuple[Promotion, Plan]:
    from loanmesh.promotion.file import read_promotion
    from loanmesh.promotion.plan import make_plan

    promotion = read_promotion(file)
    return promotion, make_plan(promotion, _capacity(capacity), scale, _quotas(quota, promotion))


def _quotas(said: Sequence[str] | None, promotion: Promotion) -> dict[str, float]:
    found = {}
    for one in said or ():
        source, _, number = one.partition("=")
        try:
            found[source] = float(number)
        except ValueError:
            found[source] = math.nan
        if source not in promotion.sources or not 0 < found[source] < math.inf:
            known = ", ".join(promotion.sources) or "none, the file limits no source"
            raise typer.BadParameter(
                f"{one!r} must be SOURCE=QUERIES_A_SECOND; sources are {known}", param_hint="--quota"
            )
    return found


# --- Writing ---


def _write(console: Console, out: Path, promotion: Promotion, made: Plan, file: Path) -> Path:
    from loanmesh.promotion.manifests import write

    try:
        return write(out, promotion, made, str(file))
    except OSError as error:
        console.print(f"[red]--out[/] {escape(str(out))} cannot be written: {error.strerror}")
        raise typer.Exit(USAGE) from error


def _write_text(console: Console, out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        console.print(f"[red]--out[/] {escape(str(out))} cannot be written: {error.strerror}")
        raise typer.Exit(USAGE) from error


def _draw(console: Console, picture: Path, promotion: Promotion, replayed: Replayed, how: str) -> None:
    from loanmesh.promotion.picture import draw

    try:
        draw(picture, promotion, replayed, how)
    except OSError as error:
        console.print(f"[red]--picture[/] {escape(str(picture))} cannot be written: {error.strerror}")
        raise typer.Exit(FAILED) from error


def _check_picture(console: Console, picture: Path) -> None:
    """End with 2 where it could not be written in the end."""
    from loanmesh.cli.firms import check_writable
    from loanmesh.promotion.picture import KINDS

    try:
        check_writable(picture)
        why = None if picture.suffix in KINDS else f"its name must end in {', '.join(KINDS)}"
    except OSError as error:
        why = error.strerror
    if why:
        console.print(f"[red]--picture[/] {escape(str(picture))} cannot be written: {why}")
        raise typer.Exit(USAGE)


def _plain(one: Any) -> dict[str, Any]:
    """A dataclass for JSON, which has no infinity."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(one)), parse_constant=lambda _: None)
    return plain


def _replayed_as_json(promotion: Promotion, made: Plan, replayed: Replayed) -> dict[str, Any]:
    return {
        "holds": replayed.holds,
        "problems": list(replayed.problems),
        **_plain(replayed),
        "backlog_peak_at": _clock(promotion, replayed.backlog_peak_at_s, whole=True),
        "plan": _plain(made),
    }


# --- Saying ---


def _say_plan(console: Console, promotion: Promotion, made: Plan) -> None:
    console.print(
        f"[bold]{promotion.name}[/]: {made.arrivals_a_second:,.0f} applications a second from"
        f" {_clock(promotion, 0.0, whole=True)} {promotion.timezone} for {_seconds(promotion.height_s)}"
    )
    services = Table("service", box=None, header_style="dim")
    for title in ("replicas", "at most", "each, a second", "planned for, a second"):
        services.add_column(title, justify="right")
    for name, one in made.services.items():
        services.add_row(name, str(one.replicas), str(one.most), f"{one.a_second:,.0f}", f"{one.load_a_second:,.0f}")
    console.print(services)
    for database, used in made.connections.items():
        room = "" if used.fits else "  [red]too many[/]"
        console.print(
            f"connections of {database}'s database: {used.planned} planned, {used.most} at most,"
            f" {used.available} there{room}"
        )
    bounds = ", ".join(f"{bound} {rate:,.0f}" for bound, rate in made.bounds.items()) or "none that the file names"
    console.print(f"decisions a second: {made.needed_a_second:,.0f} needed; bounds: {bounds}")
    if made.bound_by:
        console.print(f"bound by: [bold]{made.bound_by}[/]; replicas are planned for what it allows")
    lead_at = _clock(promotion, -made.lead_s, whole=True)
    console.print(
        f"asked for {_seconds(made.lead_s)} before, at {lead_at}: pods boot and autoscalers climb in that time"
    )


def _say_replayed(console: Console, promotion: Promotion, made: Plan, replayed: Replayed, how: str) -> None:
    console.print(f"[bold]{promotion.name}[/]: {replayed.came:,} came ({how})")
    if replayed.backlog_peak >= 1:
        drained = "never" if replayed.drained_at_s is None else _clock(promotion, replayed.drained_at_s)
        console.print(
            f"backlog peaks at {_clock(promotion, replayed.backlog_peak_at_s)} with {replayed.backlog_peak:,.0f}"
            f" applications; gone for good at {drained}"
        )
    else:
        console.print("no backlog: all are decided as they come")
    waits = ", ".join(f"{name} {_seconds(value)}" for name, value in replayed.decided_s.items())
    console.print(f"from coming in to decision: {waits}; asked for: 99 of 100 in {_seconds(promotion.decide_within_s)}")
    most = ", ".join(
        f"{name} {count} (planned {made.services[name].replicas})" for name, count in replayed.replicas_most.items()
    )
    console.print(f"most replicas: {most}")
    if replayed.holds:
        console.print("[green]the plan holds[/]")


def _next_after_plan(file: Path, written: Path | None, promotion: Promotion, made: Plan) -> str:
    name = str(file)
    if not made.holds:
        return "do that, or try what if: --quota SOURCE=NUMBER, --scale 0.5; then plan again"
    if written is None:
        return f"`loanmesh promotion simulate {name}`; then plan again with --out {OVERLAY}/plan"
    day = promotion.start - dt.timedelta(days=1)
    return (
        f"`loanmesh promotion simulate {name}`; `kubectl diff -k {OVERLAY}`; on {day:%Y-%m-%d} `kubectl apply -k"
        f" {OVERLAY}`; the day after the end `kubectl apply -k deploy/k8s/overlays/production`"
    )


def _next_after_replay(
    file: Path, promotion: Promotion, made: Plan, replayed: Replayed, scale: float, planned: bool
) -> str:
    name = str(file)
    if not replayed.holds and not planned:
        return f"`loanmesh promotion simulate {name}`, with the plan"
    if not replayed.holds:
        ways = [problem.do for problem in made.problems] or [
            f"lower utilisation below {promotion.utilisation:g}, so that more replicas are planned",
            "raise decide_within_s",
        ]
        return "; or ".join(ways)
    if scale != 1.0:
        return f"put what you expect into {name}, then `loanmesh promotion plan {name} --out {OVERLAY}/plan`"
    return f"`loanmesh promotion plan {name} --out {OVERLAY}/plan`"


def _clock(promotion: Promotion, at_s: float, *, whole: bool = False) -> str:
    """The local time so many seconds after the start."""
    start = promotion.start.replace(tzinfo=promotion.zone)
    at = (start.astimezone(dt.UTC) + dt.timedelta(seconds=at_s)).astimezone(promotion.zone)
    return f"{at:%Y-%m-%d %H:%M}" if whole else f"{at:%H:%M:%S}"


def _seconds(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "ever"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"
