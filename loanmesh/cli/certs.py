"""`loanmesh certs`: certificates for one machine. A cluster has cert-manager; see docs/security.md."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from loanmesh.cli.answer import Json, complaints, next_step, person, print_json
from loanmesh.cli.codes import FAILED, REFUSED

if TYPE_CHECKING:
    from loanmesh.cli.authority import Authority
    from loanmesh.runtime.certificates import Material

certs = typer.Typer(no_args_is_help=True, help="Make, renew and look at certificates for services, clients, operators.")


def _default_folder() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "loanmesh" / "certs"


Folder = Annotated[
    Path, typer.Option("--dir", envvar="LOANMESH_CERTS", help="Folder of the CA and all it issues.", show_default=False)
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `loanmesh` command."""
    app.add_typer(certs, name="certs")


@certs.command()
def init(
    folder: Folder = _default_folder(),  # noqa: B008  A path, computed once a process.
    trust_domain: Annotated[
        str, typer.Option(help="Whose identities it states, spiffe://TRUST_DOMAIN/...")
    ] = "loanmesh",
    days: Annotated[float, typer.Option(help="How long the CA lives.", min=0.01, max=3650)] = 90.0,
    json_: Json = False,
) -> None:
    """Make a certificate authority. Never replaces one.

    Example: `loanmesh certs init --dir ./certs`
    """
    from pydantic import TypeAdapter, ValidationError

    from loanmesh.runtime.setting_rules import TrustDomain

    try:
        TypeAdapter(TrustDomain).validate_python(trust_domain)
    except ValidationError as error:
        raise typer.BadParameter(
            "must be a name such as loanmesh or lender.example", param_hint="--trust-domain"
        ) from error
    with _working(folder) as authority:
        authority.create(trust_domain, dt.timedelta(days=days))
    _said(
        json_,
        {"ca": str(authority.bundle), "trust_domain": trust_domain},
        f"made {authority.bundle}; its key beside it signs for all",
        f"`loanmesh certs issue service intake --dir {folder}`",
    )


@certs.command()
def issue(
    kind: Annotated[str, typer.Argument(help="service, client or operator")],
    name: Annotated[str, typer.Argument(help="Its name, e.g. intake, or that of the application or person.")],
    folder: Folder = _default_folder(),  # noqa: B008  A path, computed once a process.
    namespace: Annotated[str, typer.Option(help="Of a service.")] = "loanmesh",
    dns: Annotated[
        list[str] | None, typer.Option(help="Another name that a service is reached by; repeatable.")
    ] = None,
    hours: Annotated[float, typer.Option(help="How long it lives.", min=0.01, max=24 * 366)] = 24.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a certificate that is there.")] = False,
    json_: Json = False,
) -> None:
    """Make a key and a certificate, in a folder of its own, to be handed to whom it is for.

    Example: `loanmesh certs issue client shop --dir ./certs`
    """
    import re

    from loanmesh.cli.authority import KINDS, Subject

    if kind not in KINDS:
        raise typer.BadParameter(f"must be one of {', '.join(KINDS)}", param_hint="KIND")
    for hint, word in (("NAME", name), ("--namespace", namespace)):
        if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", word):
            raise typer.BadParameter(
                "must be 1 to 63 lower-case letters, digits, dots, dashes or underscores", param_hint=hint
            )
    with _working(folder) as authority:
        subject = Subject(kind, name, namespace, tuple(dns or ()))
        made = authority.issue(subject, dt.timedelta(hours=hours), overwrite=overwrite)
        identity = subject.identity(authority.trust_domain)
    if kind == "service":
        prefix = f"{name.upper()}_TLS__"
        use = f"{prefix}CERT_FILE={made}/tls.crt {prefix}KEY_FILE={made}/tls.key {prefix}CA_FILE={made}/ca.crt"
    else:
        use = f"LOANMESH_TLS_CA={made}/ca.crt LOANMESH_TLS_CERT={made}/tls.crt LOANMESH_TLS_KEY={made}/tls.key"
    _said(json_, {"identity": identity, "folder": str(made)}, f"{identity} in {made}", f"use it by `{use}`")


@certs.command()
def renew(
    names: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None,
    folder: Folder = _default_folder(),  # noqa: B008  A path, computed once a process.
    all_: Annotated[bool, typer.Option("--all", help="All, however long they still live.")] = False,
    json_: Json = False,
) -> None:
    """Renew certificates with less than a third of their life left. Processes pick them up by themselves.

    Example: `loanmesh certs renew --dir ./certs`, every hour
    """
    with _working(folder) as authority:
        if unknown := set(names or ()) - {path.name for path, _ in authority.state()}:
            raise typer.BadParameter(f"nothing was issued to {', '.join(sorted(unknown))}", param_hint="NAMES")
        renewed = authority.renew(all_=all_, names=names or ())
    text = "\n".join(f"renewed {path}" for path in renewed) or "nothing needs it yet; --all renews all the same"
    then = "processes here pick it up within 10 s; `loanmesh certs show` tells until when each is valid"
    _said(json_, {"renewed": [str(path) for path in renewed]}, text, then)


@certs.command("rotate-ca")
def rotate_ca(
    folder: Folder = _default_folder(),  # noqa: B008  A path, computed once a process.
    days: Annotated[float, typer.Option(help="How long the new CA lives.", min=0.01, max=3650)] = 90.0,
    json_: Json = False,
) -> None:
    """Replace the CA, first step of three: make a new one, and let everybody believe both.

    Example: `loanmesh certs rotate-ca`, wait, `loanmesh certs renew --all`, wait, `loanmesh certs retire-ca`
    """
    with _working(folder) as authority:
        authority.replace(dt.timedelta(days=days))
    _said(
        json_,
        {"ca": str(authority.bundle)},
        "both CAs are believed now",
        "when all processes have looked (10 s; TLS__RELOAD_S) and ca.crt is with all who are elsewhere: `loanmesh certs"
        " renew --all`",
    )


@certs.command("retire-ca")
def retire_ca(folder: Folder = _default_folder(), json_: Json = False) -> None:  # noqa: B008  As above.
    """Replace the CA, last step: believe in the new one only. Refused while a certificate of the old one is in use.

    Example: `loanmesh certs retire-ca --dir ./certs`
    """
    with _working(folder) as authority:
        dropped = authority.retire()
    _said(
        json_,
        {"dropped": dropped},
        "only the new CA is believed now" if dropped else "there was only one CA",
        "`loanmesh certs show` tells until when each is valid",
    )


@certs.command()
def show(
    folder: Folder = _default_folder(),  # noqa: B008  A path, computed once a process.
    json_: Json = False,
) -> None:
    """Show who has a certificate and until when. Ends with 1 where one has expired or should have been renewed.

    Example: `loanmesh certs show --dir ./certs --json`
    """
    from loanmesh.runtime.certificates import Files, read
    from loanmesh.runtime.clock import SystemClock

    now = SystemClock().now()
    with _working(folder) as authority:
        trust_domain = authority.trust_domain
        ca_expires_at = read(Files(authority.bundle)).ca_expires_at
        rows = [_row(path, material, now) for path, material in authority.state()]
    ca_left_s = (ca_expires_at - now).total_seconds()
    ca = {
        "identity": f"CA of {trust_domain}",
        "expires_at": ca_expires_at.isoformat(timespec="seconds"),
        "left_s": round(ca_left_s),
        "state": "expired" if ca_left_s <= 0 else "expires soon" if ca_left_s < 14 * 86400 else "valid",
        "path": str(authority.bundle),
    }
    rows.insert(0, ca)
    if json_:
        print_json(rows)
    else:
        colours = {"valid": "green", "expires soon": "yellow", "expired": "red"}
        console = person(whole=True)
        for one in rows:
            state = f"[{colours[str(one['state'])]}]{one['state']}[/]"
            console.print(f"{one['identity']}  {state} until {one['expires_at']}  [dim]{escape(str(one['path']))}[/]")
        next_step(_then(ca, rows[1:]))
    if any(one["state"] != "valid" for one in rows):
        raise typer.Exit(FAILED)


def _then(ca: Mapping[str, object], issued: Sequence[Mapping[str, object]]) -> str:
    if ca["state"] != "valid":
        return "`loanmesh certs rotate-ca`"
    if any(one["state"] != "valid" for one in issued):
        return "`loanmesh certs renew`, or `loanmesh certs renew --all`"
    if not issued:
        return "`loanmesh certs issue service intake`"
    return "nothing; `loanmesh certs renew`, every hour, keeps it so"


def _row(path: Path, material: Material, now: dt.datetime) -> dict[str, object]:
    left_s = material.left_s(now) or 0.0
    state = "expired" if left_s <= 0 else "expires soon" if material.expires_soon(now) else "valid"
    expires_at = material.expires_at.isoformat(timespec="seconds") if material.expires_at else ""
    return {
        "identity": material.identity,
        "expires_at": expires_at,
        "left_s": round(left_s),
        "state": state,
        "path": str(path),
    }


@contextlib.contextmanager
def _working(folder: Path) -> Iterator[Authority]:
    """Ends with 4 where it is refused, with 1 where the disk or a file does not let us."""
    from loanmesh.cli.authority import Authority, CannotIssue
    from loanmesh.runtime.certificates import BadCertificate
    from loanmesh.runtime.clock import SystemClock

    complain = complaints()
    try:
        yield Authority(folder.resolve(), SystemClock().now)
    except CannotIssue as error:
        complain.print(f"[red]refused[/]: {escape(str(error))}")
        raise typer.Exit(REFUSED) from error
    except BadCertificate as error:
        complain.print(f"[red]cannot be used[/]: {escape(str(error))}; `loanmesh certs issue --overwrite` makes it new")
        raise typer.Exit(FAILED) from error
    except OSError as error:
        complain.print(f"[red]--dir[/] {escape(str(error.filename or folder))}: {error.strerror}")
        raise typer.Exit(FAILED) from error


def _said(json_: bool, answer: dict[str, object], text: str, then: str) -> None:
    if json_:
        print_json(answer)
    else:
        person(whole=True).print(escape(text))
        next_step(then)
