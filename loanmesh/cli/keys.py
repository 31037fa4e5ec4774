"""`loanmesh keys`: make, rotate, show and retire the keys that personal data is sealed with. Never shows a key."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.markup import escape

from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import FAILED, REFUSED, UNREACHABLE, USAGE
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.runtime.keys import (
    AHEAD_S,
    PURPOSES,
    Key,
    KeyRing,
    Keys,
    KeySet,
    WrongKeys,
    new_key,
    new_ring,
    read_ring,
    write_ring,
)

if TYPE_CHECKING:
    from loanmesh.runtime.database import Database
    from services.intake.keeping import Keeping as IntakeKeeping

ROWS = 200
T = TypeVar("T")
Service = Literal["intake", "bureau"]
File = Annotated[Path, typer.Argument(help="The keys file, as INTAKE_PRIVACY__KEYS_FILE names it.")]
Which = Annotated[Service, typer.Argument(help="Whose database: intake or bureau.")]
State = Annotated[
    Path | None,
    typer.Option("--state", help="State folder of a `loanmesh up` with SQLite files; else the service's settings."),
]
app = typer.Typer(no_args_is_help=True, help="Keys that personal data is sealed with: make, rotate, show, retire.")


def register(to: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    to.add_typer(app, name="keys")


@app.command()
def new(file: File, json_: Json = False) -> None:
    """Make a keys file, for its owner alone. One that is there is never written over.

    Example: `loanmesh keys new var/intake-keys.json`
    """
    try:
        write_ring(file, new_ring(SystemClock().now()), new=True)
    except OSError as error:
        _end(f"{file} cannot be made: {error.strerror or error}", FAILED)
    _print(read_ring(file), json_)
    if not json_:
        _say(f"made {file} (0600)")
        next_step("keep a copy apart from the database: without it, what is stored cannot be read")


@app.command()
def rotate(
    file: File,
    only: Annotated[Literal["seal", "look_up"] | None, typer.Option(help="Only keys of this purpose.")] = None,
    ahead: Annotated[
        float, typer.Option(help="Seconds until it is used: all replicas must have read it.", min=0)
    ] = AHEAD_S,
    json_: Json = False,
) -> None:
    """Add newer keys, which all replicas use from a little later on; what is stored moves to them by itself.

    Example: `loanmesh keys rotate var/intake-keys.json`
    """
    ring = _read(file)
    at = SystemClock().now() + dt.timedelta(seconds=ahead)
    sets = {purpose: getattr(ring, purpose) for purpose in PURPOSES}
    for purpose in PURPOSES if only is None else (only,):
        sets[purpose] = KeySet((*sets[purpose].keys, new_key(purpose, at)))
    _write(file, KeyRing(**sets))
    _print(read_ring(file), json_)
    if not json_:
        _say(f"used from {at:%H:%M:%S} UTC on; the services then move what is stored by themselves")
        next_step(
            "`loanmesh keys use SERVICE` says how many rows still need the old ones, `loanmesh keys retire` takes"
            " them away when none does"
        )


@app.command()
def show(file: File, json_: Json = False) -> None:
    """Show which keys there are and since when they are used; never a key itself.

    Example: `loanmesh keys show var/intake-keys.json`
    """
    _print(_read(file), json_)
    if not json_:
        next_step(
            f"`loanmesh keys use SERVICE` says how many rows need each; `loanmesh keys rotate {file}` adds newer ones"
        )


@app.command()
def reseal(service: Which, state: State = None, json_: Json = False) -> None:
    """Move everything that is stored to the newest keys now; may be stopped and run again at any time.

    Example: `loanmesh keys reseal intake --state var`
    """
    moved, use = _run(_reseal(service, state, json_))
    if json_:
        print_json({"moved": moved, "rows_by_key": use})
        return
    _say(f"moved {moved}")
    _tell_use(use)


@app.command()
def use(service: Which, state: State = None, json_: Json = False) -> None:
    """Say how many rows still need each key.

    Example: `loanmesh keys use intake --state var`
    """
    found = _run(_use(service, state))
    if json_:
        print_json(found)
    else:
        _tell_use(found)


@app.command()
def retire(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `keys show` says it.")],
    service: Which,
    state: State = None,
    json_: Json = False,
) -> None:
    """Take a key out of the file, when no row needs it. Copies of the database that still do can then be read no more.

    Example: `loanmesh keys retire seal-20261125-1a2b3c intake --state var`
    """
    file = Path(_settings(service, state)[1])
    ring = _read(file)
    sets = {purpose: getattr(ring, purpose) for purpose in PURPOSES}
    now = SystemClock().now()
    held = next((purpose for purpose in PURPOSES if sets[purpose].get(key_id)), None)
    if held is None:
        _end(f"{file} has no key {key_id}; `loanmesh keys show {file}` says which there are", USAGE)
    if sets[held].current(now).id == key_id:
        _end(f"{key_id} is in use now; `loanmesh keys rotate {file}` makes a newer one", REFUSED)
    if rows := _run(_use(service, state)).get(key_id):
        _end(f"{rows} rows still need {key_id}; `loanmesh keys reseal {service}` moves them", REFUSED)
    sets[held] = KeySet(tuple(key for key in sets[held].keys if key.id != key_id))
    _write(file, KeyRing(**sets))
    _print(read_ring(file), json_)
    if not json_:
        _say(f"{key_id} is gone from {file}")
        next_step("destroy its other copies too")


async def _reseal(service: Service, state: Path | None, json_: bool) -> tuple[int, dict[str, int]]:
    clock = SystemClock()
    database, keys = await _open(service, state, clock)
    console = complaints()
    total = 0
    try:
        if service == "intake":
            keeping, place = _keeping(database, keys, clock), ""
            from services.intake.keeping import DONE

            while place != DONE:
                place, moved, _ = await keeping.reseal(place, ROWS)
                total += moved
                if moved and not json_:
                    console.print(f"[dim]{total} moved, at {place}[/]")
            return total, await keeping.use()
        from loanmesh.runtime.sealed import Sealer
        from services.bureau.gather import Key as BureauKey
        from services.bureau.keeping import FIRST
        from services.bureau.keeping import Keeping as BureauKeeping

        bureau = BureauKeeping(database, Sealer(keys))
        after: BureauKey | None = FIRST
        while after:
            after, moved = await bureau.reseal(after, ROWS)
            total += moved
        return total, await bureau.use()
    finally:
        await database.close()


async def _use(service: Service, state: Path | None) -> dict[str, int]:
    clock = SystemClock()
    database, keys = await _open(service, state, clock)
    try:
        if service == "intake":
            return await _keeping(database, keys, clock).use()
        from loanmesh.runtime.sealed import Sealer
        from services.bureau.keeping import Keeping as BureauKeeping

        return await BureauKeeping(database, Sealer(keys)).use()
    finally:
        await database.close()


def _keeping(database: Database, keys: Keys, clock: Clock) -> IntakeKeeping:
    from loanmesh.runtime.sealed import Sealer
    from services.intake.keeping import Keeping
    from services.intake.privacy import Privacy

    return Keeping(database, clock, "loanmesh-keys", Privacy(Sealer(keys)))


async def _open(service: Service, state: Path | None, clock: Clock) -> tuple[Database, Keys]:
    from loanmesh.runtime.database import open_database

    url, file = _settings(service, state)
    keys = Keys(_read(Path(file)), clock)
    return await open_database(url), keys


def _settings(service: Service, state: Path | None) -> tuple[str, str]:
    """(Database, keys file) of a service: of a mesh's state folder, else as its own settings say."""
    if state is not None:
        from loanmesh.cli.mesh import keys_file

        database = state / f"{service}.db"
        if not database.exists():
            _end(f"{state} holds no {service}.db; with PostgreSQL, set {service.upper()}_DATABASE_URL instead", USAGE)
        return f"sqlite:///{database}", str(keys_file(state, service))
    from loanmesh.runtime.settings import load
    from services.bureau.settings import BureauSettings
    from services.intake.settings import IntakeSettings

    settings = load(IntakeSettings) if service == "intake" else load(BureauSettings)
    return settings.database_url.get_secret_value(), settings.privacy.keys_file


def _run(work: Coroutine[Any, Any, T]) -> T:
    from loanmesh.runtime.errors import DependencyDown

    try:
        return asyncio.run(work)
    except DependencyDown as error:
        _end(str(error), UNREACHABLE)


def _read(file: Path) -> KeyRing:
    try:
        return read_ring(file)
    except WrongKeys as error:
        _end(str(error), USAGE)


def _write(file: Path, ring: KeyRing) -> None:
    try:
        write_ring(file, ring)
    except OSError as error:
        _end(f"{file} cannot be written: {error.strerror}; in a cluster, change the Secret it is mounted from", FAILED)


def _print(ring: KeyRing, json_: bool) -> None:
    now = SystemClock().now()
    rows = [
        _row(purpose, key, getattr(ring, purpose), now) for purpose in PURPOSES for key in getattr(ring, purpose).keys
    ]
    if json_:
        print_json(rows)
        return
    for row in rows:
        _say(f"{row['purpose']:8} {row['id']:32} from {row['current_from']}  {row['state']}")


def _row(purpose: str, key: Key, keys: KeySet, now: dt.datetime) -> Mapping[str, str]:
    state = "in use" if keys.current(now) == key else "to come" if key.current_from > now else "reads old rows"
    return {"purpose": purpose, "id": key.id, "current_from": f"{key.current_from:%Y-%m-%dT%H:%M:%SZ}", "state": state}


def _tell_use(found: Mapping[str, int]) -> None:
    for key, rows in sorted(found.items()):
        _say(f"{key or 'not sealed yet':32} {rows} rows")
    next_step("a key that is not named here is needed by no row: `loanmesh keys retire` takes it away")


def _say(text: str) -> None:
    person(whole=True).print(escape(text))


def _end(text: str, code: int) -> NoReturn:
    complaints().print(f"[red]{escape(text)}[/]")
    raise typer.Exit(code)
