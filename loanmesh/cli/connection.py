"""How commands connect: the options about it, in one place, for all commands that talk to a process.

A command that has an `--address` gets `--tls-ca`, `--tls-cert`, `--tls-key` and `--token-file` by itself, where its
Typer is an `App`. Without them, the folder that LOANMESH_CERTS names is taken, as `loanmesh up --tls` tells it. It gets
`--state` too, where it has none: without an address, the mesh that `up` runs on that folder is meant.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from loanmesh.cli.folder import State, chosen

if TYPE_CHECKING:
    import grpc

    from loanmesh.client import Client, Security
    from loanmesh.client.security import Bearer

CERTS = "LOANMESH_CERTS"
"""Names a folder of `loanmesh certs`; commands then show its `clients/local` or `operators/local`."""
_OPTIONS = {
    "tls_ca": ("--tls-ca", "LOANMESH_TLS_CA", "CAs to believe, PEM. With it, TLS is spoken."),
    "tls_cert": ("--tls-cert", "LOANMESH_TLS_CERT", "Our certificate, PEM."),
    "tls_key": ("--tls-key", "LOANMESH_TLS_KEY", "Its key, PEM."),
    "token_file": ("--token-file", "LOANMESH_TOKEN_FILE", "File with a token (JWT) that says who calls."),
}
Address = Annotated[
    str, typer.Option(envvar="LOANMESH_ADDRESS", help="Address of intake; else that of the mesh that `up` runs.")
]
_given: contextvars.ContextVar[Mapping[str, Path | None]] = contextvars.ContextVar("given", default={})  # noqa: B039  Read only.
_state: contextvars.ContextVar[Path] = contextvars.ContextVar("state", default=Path())
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
Role = Literal["client", "operator"]


class App(typer.Typer):
    """A Typer whose commands connect."""

    def command(self, *names: Any, **options: Any) -> Callable[[F], F]:
        """See Typer.command."""
        register = super().command(*names, **options)

        def decorate(function: F) -> F:
            register(_connecting(function))
            return function

        return decorate


def _connecting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same command, with the options about connecting where it has an address."""
    signature = inspect.signature(function, eval_str=True)
    if "address" not in signature.parameters:
        return function
    has_state = "state" in signature.parameters

    @functools.wraps(function)
    def command(**options: Any) -> Any:
        _given.set({name: options.pop(name) for name in _OPTIONS})
        _state.set(options["state"] if has_state else options.pop("state"))
        return function(**options)

    ours = [_parameter(name, *rest) for name, rest in _OPTIONS.items()]
    if not has_state:
        ours.append(inspect.Parameter("state", inspect.Parameter.KEYWORD_ONLY, default=Path(), annotation=State))
    whole = signature.replace(parameters=[*signature.parameters.values(), *ours])
    vars(command)["__signature__"] = whole
    command.__annotations__ = {name: one.annotation for name, one in whole.parameters.items()}
    return command


def _parameter(name: str, flag: str, variable: str, help_: str) -> inspect.Parameter:
    option = typer.Option(flag, envvar=variable, help=help_, exists=True, dir_okay=False, show_default=False)
    kind = Annotated[Path | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)


def security(role: Role) -> Security | None:
    """What was given to the command that runs now; None: no TLS. Ends with 2 where it does not go together."""
    from loanmesh.client import Security

    given = _given.get()
    ca, certificate, key, token = (given.get(name) for name in _OPTIONS)
    if ca is None:
        if alone := [_OPTIONS[name][0] for name, value in given.items() if value]:
            raise typer.BadParameter("must be set too: the CAs to believe", param_hint=f"--tls-ca, beside {alone[0]}")
        folder = os.environ.get(CERTS)
        return Security.in_folder(Path(folder) / f"{role}s" / "local") if folder else None
    if (certificate is None) != (key is None):
        raise typer.BadParameter("go together: give both, or neither", param_hint="--tls-cert, --tls-key")
    return Security(ca, certificate, key, token)


async def intake(address: str) -> str:
    """Where intake is: at the address that was named, else in the mesh that `up` runs, else at its usual port."""
    from loanmesh.cli import processes

    return address or await processes.intake(chosen(_state.get()))


@contextlib.asynccontextmanager
async def client(address: str, **options: Any) -> AsyncIterator[Client]:
    """A client of intake (see `intake`), connected as the command was told. Ends with 2 where a file cannot be used."""
    from loanmesh.client import Client

    ours = security("client")
    found = await intake(address)
    try:
        made = _usable(lambda: Client(found, security=ours, **options))
    except ValueError as error:
        hint = "--tls-ca" if ours is None else "--address"
        raise typer.BadParameter(str(error), param_hint=hint) from error
    async with made:
        yield made


def channel(address: str) -> grpc.aio.Channel:
    """A channel to one process at HOST:PORT, whichever service it is, or to a gRPC name that begins with the service.

    Ends with 2 where a file cannot be used. Raises AioRpcError, as a call would, where TLS is spoken and the process
    cannot be asked who it is.
    """
    import grpc

    from loanmesh.client.security import Bearer
    from loanmesh.runtime.certificates import Watched
    from loanmesh.runtime.handshake import service_at
    from loanmesh.runtime.rotation import credentials, named

    ours = security("operator")
    if ours is None:
        return grpc.aio.insecure_channel(address)
    files = ours.files
    shown = _usable(lambda: credentials(Watched(files)))
    host, _, port = address.rpartition(":")
    if host.startswith("dns:"):
        service = host.rsplit("/", 1)[-1].split(".")[0]
    else:
        try:
            service = service_at(host.strip("[]"), int(port), files)
        except OSError as error:
            raise _away(str(error)) from error
    interceptors = _signing(Bearer(ours.token))
    return grpc.aio.secure_channel(address, shown, options=named(service), interceptors=interceptors)


async def explained(error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
    """The same; where TLS is why nobody answers, with details that begin with its `tls_...` and say so."""
    import grpc

    from loanmesh.runtime.clock import SystemClock
    from loanmesh.runtime.handshake import WORDS, Diagnosis

    if error.code() is not grpc.StatusCode.UNAVAILABLE:
        return error
    ours = security("operator")
    cause = await Diagnosis("", ours.files if ours else None, SystemClock()).cause(error.details() or "")
    return _away(f"{cause}: {WORDS[cause]}") if cause else error


def _away(details: str) -> grpc.aio.AioRpcError:
    import grpc

    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


def _signing(bearer: Bearer) -> Sequence[grpc.aio.ClientInterceptor]:
    import grpc

    class Signing(grpc.aio.UnaryUnaryClientInterceptor):
        """Sends the token with each call."""

        async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            metadata = grpc.aio.Metadata(*(details.metadata or ()), *bearer.metadata())
            return await continuation(details._replace(metadata=metadata), request)

    return [Signing()] if bearer.metadata() else []


def _usable(make: Callable[[], T]) -> T:
    from loanmesh.runtime.certificates import BadCertificate

    try:
        return make()
    except BadCertificate as error:
        option = {"ca": "--tls-ca", "certificate": "--tls-cert", "key": "--tls-key"}[error.role]
        raise typer.BadParameter(str(error), param_hint=option) from error
