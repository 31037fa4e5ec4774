"""A server that speaks TLS, with a CA of its own, in this process: what the tests of TLS talk to."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceServicer, add_IntakeServiceServicer_to_server
from lending.ops.v1 import ops_service_pb2 as ops_pb
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceServicer, add_OpsServiceServicer_to_server

from loanmesh.cli.authority import Authority, Subject
from loanmesh.client import Security
from loanmesh.runtime.caller import proven, said
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.server import make_server
from loanmesh.runtime.settings import AccessSettings, ServerSettings, ServiceSettings, TlsSettings, TokenSettings
from loanmesh.runtime.tls import ServerCertificates, server_certificates
from services.intake.admission import Admission
from services.intake.arrival import Arrivals
from services.intake.quota import Allowance, Quota

CLOCK = SystemClock()
LOOK_S = 0.05
"""How often files are looked at here."""
NAME = "lenders/demo/applications/" + "0" * 36


class Intake(IntakeServiceServicer):
    """Answers at once; notes who called, and for how many bytes' worth of requests it was asked."""

    def __init__(self) -> None:
        self.callers: list[str] = []
        self.admission = Admission(1e9, Arrivals(), Quota(0, 1, {"greedy": Allowance(0.5, 2)}), CLOCK)
        self.hold: asyncio.Event | None = None

    async def SubmitApplication(self, request: pb.SubmitApplicationRequest, context: Any) -> Any:
        client, _ = self.admission.arrived(said())
        self.admission.pay(client, 1)
        self.callers.append(client)
        return pb.SubmitApplicationResponse(application=pb.Application(name=NAME))

    async def GetApplication(self, request: pb.GetApplicationRequest, context: Any) -> pb.GetApplicationResponse:
        who = proven()
        self.callers.append(who.path if who else "")
        if self.hold:
            await self.hold.wait()
        return pb.GetApplicationResponse(application=pb.Application(name=request.name))

    async def WatchApplication(self, request: pb.WatchApplicationRequest, context: Any) -> AsyncIterator[Any]:
        yield pb.WatchApplicationResponse(application=pb.Application(name=request.name, revision=1))


class Ops(OpsServiceServicer):
    """Knows nothing, but answers."""

    async def GetStatus(self, request: ops_pb.GetStatusRequest, context: Any) -> ops_pb.GetStatusResponse:
        return ops_pb.GetStatusResponse(service="intake")


class Secured:
    """A server named intake; `authority` issues whatever certificate a test needs."""

    def __init__(self, folder: Path, tokens: TokenSettings, access: str, age_s: float) -> None:
        self.folder = folder
        self.authority = Authority(folder, CLOCK.now)
        self.authority.create("loanmesh")
        own = self.authority.issue(Subject("service", "intake"))
        tls = TlsSettings(
            cert_file=str(own / "tls.crt"),
            key_file=str(own / "tls.key"),
            ca_file=str(own / "ca.crt"),
            reload_s=LOOK_S,
        )
        server = ServerSettings(max_connection_age_s=age_s)
        settings = ServiceSettings(tls=tls, tokens=tokens, server=server, access=AccessSettings(table_file=access))
        certificates = server_certificates("intake", "INTAKE_", settings, CLOCK)
        assert certificates
        self.certificates: ServerCertificates = certificates
        self.intake = Intake()  # type: ignore[abstract]  # Only what the tests call.
        self.server = make_server(settings.server, CLOCK, certificates.door())
        self.token_server = make_server(settings.server, CLOCK, certificates.door(), by_token=True)
        self.health = health.aio.HealthServicer()
        for each in (self.server, self.token_server):
            add_IntakeServiceServicer_to_server(self.intake, each)
            add_OpsServiceServicer_to_server(Ops(), each)  # type: ignore[abstract]  # As above.
            health_pb2_grpc.add_HealthServicer_to_server(self.health, each)
        port = self.server.add_secure_port("127.0.0.1:0", certificates.credentials())
        self.address = f"127.0.0.1:{port}"
        port = self.token_server.add_secure_port("127.0.0.1:0", certificates.credentials(client_certificates=False))
        self.token_address = f"127.0.0.1:{port}"

    def security(self, kind: str, name: str, **more: Any) -> Security:
        """As that caller, with a certificate issued now."""
        made = self.authority.issue(Subject(kind, name), overwrite=True)
        return Security(made / "ca.crt", made / "tls.crt", made / "tls.key", reload_s=LOOK_S, **more)

    async def taken_over(self) -> None:
        """Until the server shows and believes what its files hold."""
        folder = self.folder / "services" / "intake"
        held = [(folder / name).read_bytes() for name in ("tls.crt", "ca.crt")]
        await until(lambda: held == [self.certificates.material.certificate_pem, self.certificates.material.ca_pem])

    def believing(self, **more: Any) -> Security:
        """As somebody without a certificate."""
        return Security(self.folder / "ca.crt", reload_s=LOOK_S, **more)


def long_ago(days: float) -> Callable[[], dt.datetime]:
    """A clock that stands in the past."""
    return lambda: CLOCK.now() - dt.timedelta(days=days)


@asynccontextmanager
async def secured(
    folder: Path, *, tokens: TokenSettings | None = None, access: str = "", age_s: float = 30.0
) -> AsyncIterator[Secured]:
    made = Secured(folder, tokens or TokenSettings(), access, age_s)
    await made.server.start()
    await made.token_server.start()
    await made.health.set("", health_pb2.HealthCheckResponse.SERVING)
    watching = asyncio.create_task(made.certificates.watch_forever())
    try:
        yield made
    finally:
        watching.cancel()
        await asyncio.gather(made.server.stop(0), made.token_server.stop(0))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await CLOCK.sleep(0.01)


async def status_of(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK
