"""TLS, on real connections: who gets in, what the others are told, and that certificates change under traffic."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lending.intake.v1 import intake_service_pb2 as pb
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from lending.ops.v1 import ops_service_pb2 as ops_pb
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub
from structlog.testing import capture_logs

from loanmesh.cli.authority import Authority, Subject
from loanmesh.client import CallFailed, Client, Overloaded, Security, TlsFailed
from loanmesh.runtime.certificates import Watched
from loanmesh.runtime.channel import SERVICE_CONFIG, channel_options, make_channel
from loanmesh.runtime.rotation import RotatingChannel, credentials, named
from tests.builders import an_application
from tests.integration.secured import CLOCK, LOOK_S, NAME, Secured, long_ago, secured, status_of, until


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Secured]:
    async with secured(tmp_path / "certs") as made:
        yield made


ROTATIONS = int(os.environ.get("LOANMESH_ROTATIONS", "20"))
"""More of them in `make rotations`."""


def channel_of(security: Security, address: str) -> grpc.aio.Channel:
    """A plain secure channel, without anything of ours."""
    return grpc.aio.secure_channel(address, credentials(Watched(security.files)), options=named("intake"))


async def test_a_client_with_a_certificate_is_who_it_says(mesh: Secured) -> None:
    async with Client(mesh.address, client_id="somebody-else", security=mesh.security("client", "local")) as client:
        await client.submit(an_application())
        await client.get(NAME)
        assert [application.revision async for application in client.watch(NAME)] == [1]
    assert mesh.intake.callers == ["local", "client/local"]


async def failure(mesh: Secured, security: Security | None) -> TlsFailed:
    with pytest.raises(TlsFailed) as failed:
        async with Client(mesh.address, patience_s=2, security=security) as client:
            await client.get(NAME)
    assert mesh.intake.callers == []
    return failed.value


async def test_a_server_of_another_ca_is_not_believed(mesh: Secured, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", CLOCK.now)
    other.create("loanmesh")
    ours = mesh.security("client", "local")
    failed = await failure(mesh, Security(other.bundle, ours.cert_file, ours.key_file))
    assert failed.error_type == "tls_server_untrusted"
    assert "signed by none of the CAs" in str(failed)


async def test_a_client_of_another_ca_does_not_get_in(mesh: Secured, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", CLOCK.now)
    other.create("loanmesh")
    folder = other.issue(Subject("client", "local"))
    failed = await failure(mesh, Security(mesh.authority.bundle, folder / "tls.crt", folder / "tls.key"))
    assert failed.error_type == "tls_client_untrusted"


async def test_an_expired_certificate_does_not_get_in(mesh: Secured) -> None:
    folder = Authority(mesh.folder, long_ago(2)).issue(Subject("client", "late"))
    failed = await failure(mesh, Security.in_folder(folder))
    assert failed.error_type == "tls_client_expired"
    assert "our certificate has expired" in str(failed)


async def test_without_a_certificate_nobody_gets_in(mesh: Secured) -> None:
    assert (await failure(mesh, mesh.believing())).error_type == "tls_client_required"


async def test_without_tls_nobody_gets_in(mesh: Secured) -> None:
    assert (await failure(mesh, None)).error_type == "tls_required"


async def test_a_server_that_is_another_service_is_not_believed(mesh: Secured) -> None:
    failed = await failure(mesh, mesh.security("client", "local", server_name="bureau"))
    assert failed.error_type == "tls_server_name"


async def test_an_expired_server_is_not_believed(mesh: Secured) -> None:
    Authority(mesh.folder, long_ago(2)).issue(Subject("service", "intake"), overwrite=True)
    await mesh.taken_over()
    assert (await failure(mesh, mesh.security("client", "local"))).error_type == "tls_server_expired"


async def test_a_server_without_tls_is_told_from_one_that_is_away(mesh: Secured) -> None:
    plain = grpc.aio.server()
    address = f"127.0.0.1:{plain.add_insecure_port('127.0.0.1:0')}"
    await plain.start()
    with pytest.raises(TlsFailed) as failed:
        async with Client(address, patience_s=2, security=mesh.security("client", "local")) as client:
            await client.get(NAME)
    assert failed.value.error_type == "tls_server_plaintext"
    await plain.stop(0)


async def test_a_stranger_to_the_trust_domain_is_nobody(mesh: Secured) -> None:
    """Signed by our CA, but for a mesh that is not ours."""
    folder = mesh.authority.issue(Subject("client", "local"))
    _reissue_as(mesh, folder, "spiffe://elsewhere/client/local")
    with pytest.raises(CallFailed) as failed:
        async with Client(mesh.address, security=Security.in_folder(folder)) as client:
            await client.get(NAME)
    assert failed.value.code == "UNAUTHENTICATED"
    assert failed.value.reason == "NO_IDENTITY"
    assert mesh.intake.callers == []


def _reissue_as(mesh: Secured, folder: Path, identity: str) -> None:
    """The same certificate, with another identity, signed by the same CA."""
    ca = x509.load_pem_x509_certificate((mesh.folder / "ca.crt").read_bytes())
    ca_key = load_pem_private_key((mesh.folder / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(ca.subject)
        .public_key(old.public_key())
        .serial_number(1)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=True)
    )
    made = builder.sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]  # Ours is an EC key.
    (folder / "tls.crt").write_bytes(made.public_bytes(Encoding.PEM))


# --- May they? ---


async def test_the_right_certificate_in_the_wrong_role_is_refused_before_its_request_is_read(mesh: Secured) -> None:
    async with channel_of(mesh.security("service", "pricing"), mesh.address) as channel:
        nonsense: Any = channel.unary_unary("/lending.intake.v1.IntakeService/SubmitApplication")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await nonsense(b"\xff\xff\xff")
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == (
            "ns/loanmesh/sa/pricing may not call lending.intake.v1.IntakeService/SubmitApplication"
        )
    async with channel_of(mesh.security("client", "local"), mesh.address) as channel:
        nonsense = channel.unary_unary("/lending.intake.v1.IntakeService/SubmitApplication")
        assert await status_of(nonsense(b"\xff\xff\xff")) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_client_acts_for_its_lenders_only(mesh: Secured) -> None:
    security = mesh.security("client", "local")
    async with Client(mesh.address, lender="lenders/other", security=security) as client:
        with pytest.raises(CallFailed) as failed:
            await client.submit(an_application())
    assert (failed.value.code, failed.value.reason) == ("PERMISSION_DENIED", "LENDER_NOT_ALLOWED")
    async with Client(mesh.address, security=mesh.security("client", "stranger")) as client:
        with pytest.raises(CallFailed, match="client/stranger may not act for lenders/demo"):
            await client.get(NAME)
    assert mesh.intake.callers == []


async def test_operators_look_but_do_not_submit_and_clients_do_not_operate(mesh: Secured) -> None:
    async with Client(mesh.address, security=mesh.security("operator", "ann")) as client:
        await client.get(NAME)
        with pytest.raises(CallFailed) as failed:
            await client.submit(an_application())
        assert failed.value.reason == "METHOD_NOT_ALLOWED"
    for kind, expected in (("operator", grpc.StatusCode.OK), ("client", grpc.StatusCode.PERMISSION_DENIED)):
        async with channel_of(mesh.security(kind, "ann"), mesh.address) as channel:
            assert await status_of(OpsServiceStub(channel).GetStatus(ops_pb.GetStatusRequest())) is expected


async def test_a_table_of_ones_own_says_for_whom_a_client_acts(tmp_path: Path) -> None:
    table = tmp_path / "access.yaml"
    table.write_text("lenders:\n  client/shop: [lenders/other]\n")
    async with secured(tmp_path / "certs", access=str(table)) as mesh:
        async with Client(mesh.address, lender="lenders/other", security=mesh.security("client", "shop")) as client:
            await client.submit(an_application())
        async with Client(mesh.address, security=mesh.security("client", "local")) as client:
            with pytest.raises(CallFailed, match="client/local may not act for lenders/demo"):
                await client.submit(an_application())


async def test_a_quota_counts_by_the_proven_name_and_says_when_to_come_again(tmp_path: Path) -> None:
    table = tmp_path / "access.yaml"
    table.write_text("lenders:\n  client/*: [lenders/demo]\n")
    async with secured(tmp_path / "certs", access=str(table)) as mesh:
        greedy = mesh.security("client", "greedy")
        # Less than it would have to wait; each in a call of its own, since this server knows no other.
        async with Client(mesh.address, client_id="local", patience_s=1.5, security=greedy, share_from=100) as client:
            submits = asyncio.gather(*(client.submit(an_application()) for _ in range(5)))
            with pytest.raises(Overloaded, match=r"its quota of 0\.5 applications a second, 2 at once") as refused:
                await submits
            assert refused.value.retry_s > 1.0
        async with Client(mesh.address, client_id="greedy", security=mesh.security("client", "modest")) as client:
            for _ in range(4):
                await client.submit(an_application())
    assert mesh.intake.callers[-4:] == ["modest"] * 4
    assert set(mesh.intake.callers[:-4]) == {"greedy"}


# --- Health ---


async def test_health_is_anybodys_also_over_tls(mesh: Secured) -> None:
    async with channel_of(mesh.believing(), mesh.token_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


# --- Rotation ---


class Traffic:
    """Calls, one after the other, each of which must succeed; on new connections now and then."""

    def __init__(self, channel: grpc.aio.Channel, lanes: int = 3) -> None:
        self._stub = IntakeServiceStub(channel)
        self._stopping = False
        self.done = 0
        self.failed: list[str] = []
        self._lanes = [asyncio.create_task(self._flow()) for _ in range(lanes)]

    async def _flow(self) -> None:
        while not self._stopping:
            try:
                await self._stub.GetApplication(pb.GetApplicationRequest(name=NAME), timeout=10)
                self.done += 1
            except grpc.aio.AioRpcError as error:
                self.failed.append(f"{error.code()}: {error.details()}")
            await CLOCK.sleep(0.002)

    async def more(self, calls: int = 30) -> None:
        """Until so many more have succeeded."""
        wanted = self.done + calls
        await until(lambda: self.done >= wanted or self.failed)

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.gather(*self._lanes)


def rotating(mesh: Secured, security: Security) -> RotatingChannel:
    made = make_channel(
        mesh.address, "intake", security.files, CLOCK, options=channel_options(SERVICE_CONFIG), reload_s=LOOK_S
    )
    assert isinstance(made, RotatingChannel)
    return made


async def test_certificates_and_then_the_ca_are_replaced_under_traffic_without_a_failed_call(tmp_path: Path) -> None:
    # Connections live for a moment only, so that all of this happens on new ones, too.
    async with secured(tmp_path / "certs", age_s=0.2) as mesh:
        async with rotating(mesh, mesh.security("client", "local")) as channel:
            traffic = Traffic(channel)

            await traffic.more()
            old = shutil.copytree(mesh.folder / "clients" / "local", tmp_path / "old")
            ca = mesh.authority
            for step in (lambda: ca.renew(all_=True), ca.replace, lambda: ca.renew(all_=True), ca.retire):
                before = channel.rotations
                step()
                await mesh.taken_over()
                await until(lambda before=before: channel.rotations > before)  # type: ignore[misc]  # Bound in the loop.
                await until(lambda: channel.retiring == 0)
                await traffic.more()
            await traffic.stop()
            assert traffic.failed == []
        # Whoever still holds the first certificate is a stranger now.
        stale = Security(mesh.authority.bundle, old / "tls.crt", old / "tls.key")
        with pytest.raises(TlsFailed):
            async with Client(mesh.address, patience_s=2, security=stale) as client:
                await client.get(NAME)


async def test_a_call_under_way_ends_on_the_channel_it_began_on(mesh: Secured) -> None:
    mesh.intake.hold = asyncio.Event()
    async with rotating(mesh, mesh.security("client", "local")) as channel:
        call = asyncio.ensure_future(IntakeServiceStub(channel).GetApplication(pb.GetApplicationRequest(name=NAME)))
        await until(lambda: mesh.intake.callers)
        mesh.authority.renew(all_=True)
        await until(lambda: channel.retiring == 1)
        mesh.intake.hold.set()
        assert (await call).application.name == NAME
        await until(lambda: channel.retiring == 0)


async def test_closing_closes_the_channels_of_before_as_well(mesh: Secured) -> None:
    mesh.intake.hold = asyncio.Event()
    channel = rotating(mesh, mesh.security("client", "local"))
    call = asyncio.ensure_future(IntakeServiceStub(channel).GetApplication(pb.GetApplicationRequest(name=NAME)))
    await until(lambda: mesh.intake.callers)
    mesh.authority.renew(all_=True)
    await until(lambda: channel.retiring == 1)
    await channel.close()
    ended, _ = await asyncio.wait([call], timeout=5)
    assert ended
    assert call.cancelled()


async def test_a_certificate_that_the_server_refuses_does_not_replace_one_that_works(
    mesh: Secured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loanmesh.runtime.rotation.CONNECT_WITHIN_S", 0.3)
    security = mesh.security("client", "local")
    folder = mesh.folder / "clients" / "local"
    async with rotating(mesh, security) as channel:
        traffic = Traffic(channel)
        await traffic.more()
        other = Authority(tmp_path / "other", CLOCK.now)
        other.create("loanmesh")
        wrong = other.issue(Subject("client", "local"))
        with capture_logs() as logs:
            for name in ("tls.key", "tls.crt"):
                os.replace(wrong / name, folder / name)
            await until(lambda: any(one.get("error_type") == "tls_new_certificate_refused" for one in logs))
        await traffic.more()
        assert channel.rotations == 0
        mesh.authority.issue(Subject("client", "local"), overwrite=True)
        await until(lambda: channel.rotations)
        await traffic.more()
        await traffic.stop()
    assert traffic.failed == []


async def test_many_rotations_leave_nothing_behind(mesh: Secured) -> None:
    started_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    security = mesh.security("client", "local")
    async with rotating(mesh, security) as channel:
        traffic = Traffic(channel, lanes=1)
        await traffic.more(5)
        counts = []
        for _ in range(ROTATIONS):
            before = channel.rotations
            mesh.authority.issue(Subject("client", "local"), overwrite=True)
            await until(lambda before=before: channel.rotations > before)  # type: ignore[misc]  # Bound in the loop.
            await until(lambda: channel.retiring == 0)
            await traffic.more(2)
            counts.append(len(os.listdir("/proc/self/fd")))
        await traffic.stop()
    assert traffic.failed == []
    assert counts[-1] <= counts[3] + 2, counts
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started_kib
    print(f"{ROTATIONS} rotations, {traffic.done} calls, 0 failed, memory grew by {grown_kib} KiB")
    # 8 MiB are there after the first few, and about 1 KiB more for each.
    assert grown_kib < 20_000 + 10 * ROTATIONS


async def test_a_renewed_certificate_is_shown_by_the_server_without_a_restart(mesh: Secured) -> None:
    context = ssl.create_default_context(cafile=str(mesh.authority.bundle))
    host, port = mesh.token_address.split(":")

    def shown() -> object:
        with (
            socket.create_connection((host, int(port)), 5) as plain,
            context.wrap_socket(plain, server_hostname="intake") as secure,
        ):
            return dict(secure.getpeercert() or {})["serialNumber"]

    first = await asyncio.to_thread(shown)
    mesh.authority.renew(all_=False)
    assert await asyncio.to_thread(shown) == first
    mesh.authority.renew(all_=True, names=["intake"])
    async with asyncio.timeout(10):
        while await asyncio.to_thread(shown) == first:
            await CLOCK.sleep(LOOK_S)
