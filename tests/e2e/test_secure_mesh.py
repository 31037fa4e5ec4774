"""`loanmesh up --tls`: the whole mesh with mTLS, from the command line; and what a single process refuses."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
from lending.ops.v1.ops_service_pb2 import GetStatusRequest
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub
from lending.scoring.v1 import scoring_service_pb2 as scoring_pb
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceStub

from loanmesh.cli.authority import Authority, Subject
from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.client import Client, Security, TlsFailed
from loanmesh.runtime.certificates import Watched
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.rotation import credentials, named
from tests.builders import an_application
from tests.e2e.test_command import run
from tests.otlp import collecting
from tests.tokens import ISSUER, Issuer

CLOCK = SystemClock()


@pytest.fixture
async def mesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    for service in ("INTAKE", "BUREAU", "SCORING", "PRICING"):
        monkeypatch.setenv(f"{service}_TLS__RELOAD_S", "0.2")
    started = Mesh(tmp_path / "state", None, free_ports(), CLOCK, print, replicas={"bureau": 2}, tls=True)
    try:
        await started.start()
        yield started
    finally:
        await started.stop()


PROCESSES = ("intake", "bureau", "bureau-2", "scoring", "pricing")


def logged(mesh: Mesh, name: str) -> list[dict[str, object]]:
    assert mesh.certs
    lines = (mesh.certs.parent / "logs" / f"{name}.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def replacements(mesh: Mesh) -> list[int]:
    """How often each process took over new files."""
    return [sum(one["event"] == "certificate_replaced" for one in logged(mesh, name)) for name in PROCESSES]


def have_looked(mesh: Mesh, wanted: list[int]) -> bool:
    return all(count >= least for count, least in zip(replacements(mesh), wanted, strict=True))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await CLOCK.sleep(0.05)


async def test_the_mesh_decides_over_mtls_and_through_a_change_of_all_certificates_and_the_ca(mesh: Mesh) -> None:
    assert mesh.certs
    authority = Authority(mesh.certs, CLOCK.now)
    ours = Security.in_folder(mesh.certs / "clients" / "local")
    security = Security(ours.ca_file, ours.cert_file, ours.key_file, reload_s=0.2)
    firms = iter(range(1, 100))

    async def decide(client: Client) -> None:
        for _ in range(3):
            answer = await client.submit(an_application("firm", next(firms), CLOCK.now()), wait_s=20)
            assert answer.HasField("decision")

    # Intake looks for itself and for each of the three it calls.
    each = [4, 1, 1, 1, 1]
    async with Client(mesh.target("intake"), security=security, patience_s=30) as client:
        await decide(client)
        for step in (
            lambda: authority.renew(all_=True),
            authority.replace,
            lambda: authority.renew(all_=True),
            authority.retire,
        ):
            wanted = [before + more for before, more in zip(replacements(mesh), each, strict=True)]
            step()
            await until(partial(have_looked, mesh, wanted))
            await decide(client)
    for name in PROCESSES:
        assert [one for one in logged(mesh, name) if str(one.get("error_type", "")).startswith("tls_")] == []

    # Whom nobody knows, from here on.
    with pytest.raises(TlsFailed) as failed:
        async with Client(mesh.target("intake"), patience_s=1) as plain:
            await plain.submit(an_application())
    assert failed.value.error_type == "tls_required"
    # A client is no operator, and a certificate of one service opens no other.
    bureau = mesh.certs / "services" / "bureau"
    done = await asyncio.to_thread(
        run, "status", "--address", mesh.parts["scoring"].address, "--json",
        LOANMESH_TLS_CA=f"{bureau}/ca.crt", LOANMESH_TLS_CERT=f"{bureau}/tls.crt", LOANMESH_TLS_KEY=f"{bureau}/tls.key",
    )  # fmt: skip
    assert done.returncode == 4
    assert "PERMISSION_DENIED" in done.stderr
    assert "ns/loanmesh/sa/bureau may not call" in done.stderr
    denied = [one for one in logged(mesh, "scoring") if one["event"] == "access_denied"]
    assert [one["caller"] for one in denied] == ["ns/loanmesh/sa/bureau"]
    done = await asyncio.to_thread(
        run, "status", "--address", mesh.parts["scoring"].address, "--json", LOANMESH_CERTS=str(mesh.certs)
    )
    assert json.loads(done.stdout)["service"] == "scoring"


async def test_the_pages_client_reads_over_mtls(mesh: Mesh) -> None:
    assert mesh.certs
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program = example.replace("127.0.0.1:7401", mesh.parts["intake"].address)
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], cwd=mesh.certs.parent, capture_output=True, text=True,
        check=False, timeout=60, env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "0 applications\n", done.stderr


async def test_a_bad_certificate_between_services_is_named_in_the_log_and_costs_no_application(mesh: Mesh) -> None:
    assert mesh.certs
    security = Security.in_folder(mesh.certs / "clients" / "local")
    past = Authority(mesh.certs, lambda: CLOCK.now() - dt.timedelta(days=2))
    async with Client(mesh.parts["intake"].address, security=security, patience_s=30) as client:
        past.issue(Subject("service", "scoring"), overwrite=True)
        mesh.kill("scoring")  # Whoever is connected stays so for a while; this is the same, now.
        stored = await client.submit(an_application("firm", 1, CLOCK.now()))
        await until(lambda: any(one.get("error_type") == "tls_server_expired" for one in logged(mesh, "intake")))
        said = [one for one in logged(mesh, "intake") if one.get("error_type") == "tls_server_expired"]
        assert [(one["dependency"], one["cause"]) for one in said] == [
            ("scoring", "the server's certificate has expired")
        ]
        assert (await client.get(stored.name)).state == stored.state
        Authority(mesh.certs, CLOCK.now).issue(Subject("service", "scoring"), overwrite=True)
        async for changed in client.watch(stored.name):
            if changed.HasField("decision"):
                break


# --- One process ---


@contextmanager
def scoring(folder: Path, **more: str) -> Iterator[tuple[Authority, dict[str, str]]]:
    """Scoring by itself, listening on all addresses, with a port for probes; its CA and its ready line."""
    authority = Authority(folder, CLOCK.now)
    authority.create("loanmesh")
    own = authority.issue(Subject("service", "scoring"))
    settings = {
        "SCORING_TLS__CERT_FILE": f"{own}/tls.crt",
        "SCORING_TLS__KEY_FILE": f"{own}/tls.key",
        "SCORING_TLS__CA_FILE": f"{own}/ca.crt",
        "SCORING_SERVER__LISTEN": "0.0.0.0:0",
        "SCORING_SERVER__HEALTH_LISTEN": "127.0.0.1:0",
    }
    command = [sys.executable, "-m", "services.scoring.main"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **settings, **more}, text=True)
    try:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        yield authority, {**ready, "address": ready["address"].replace("0.0.0.0", "127.0.0.1")}
    finally:
        process.terminate()
        assert process.wait(20) == 0


async def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code()


async def test_the_health_port_serves_health_and_nothing_else(tmp_path: Path) -> None:
    with scoring(tmp_path / "certs") as (_, ready):
        async with grpc.aio.insecure_channel(ready["health"]) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "readiness", "liveness", "lending.scoring.v1.ScoringService"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            models = ScoringServiceStub(channel).ListModels(scoring_pb.ListModelsRequest(), timeout=5)
            assert await code_of(models) is grpc.StatusCode.UNIMPLEMENTED
            reflect: Any = channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
            assert await code_of(reflect(b"", timeout=5)) is grpc.StatusCode.UNIMPLEMENTED
        async with grpc.aio.insecure_channel(ready["address"]) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert await code_of(check) is grpc.StatusCode.UNAVAILABLE


async def test_the_token_port_serves_all_to_operators_with_a_token_and_health_to_anybody(tmp_path: Path) -> None:
    issuer = Issuer(tmp_path / "keys.json", CLOCK)
    more = {
        "SCORING_SERVER__TOKEN_LISTEN": "127.0.0.1:0",
        "SCORING_TOKENS__KEYS_FILE": str(issuer.file),
        "SCORING_TOKENS__ISSUER": ISSUER,
    }
    with scoring(tmp_path / "certs", **more) as (authority, ready):
        ca = grpc.ssl_channel_credentials(authority.bundle.read_bytes())
        async with grpc.aio.secure_channel(ready["tokens"], ca, options=named("scoring")) as channel:
            status = OpsServiceStub(channel).GetStatus
            answer = await status(GetStatusRequest(), metadata=bearing(issuer.token("operator/ann")), timeout=5)
            assert answer.service == "scoring"
            assert await code_of(status(GetStatusRequest(), timeout=5)) is grpc.StatusCode.UNAUTHENTICATED
            client = status(GetStatusRequest(), metadata=bearing(issuer.token("client/shop")), timeout=5)
            assert await code_of(client) is grpc.StatusCode.PERMISSION_DENIED
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert health.status == health_pb2.HealthCheckResponse.SERVING


def bearing(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def test_what_a_process_tells_of_its_door_reaches_a_collector_over_tls(tmp_path: Path) -> None:
    outside = Authority(tmp_path / "outside", CLOCK.now)
    outside.create("loanmesh")
    files = outside.issue(Subject("service", "collector"))
    pair = ((files / "tls.key").read_bytes(), (files / "tls.crt").read_bytes())
    async with collecting(grpc.ssl_server_credentials([pair])) as collected:
        more = {
            "SCORING_TELEMETRY__OTLP_ENDPOINT": collected.endpoint,
            "SCORING_TELEMETRY__METRICS_EVERY_S": "1",
            "OTEL_EXPORTER_OTLP_CERTIFICATE": str(outside.bundle),
        }
        with scoring(tmp_path / "certs", **more) as (authority, ready):
            for kind, expected in (("client", "METHOD_NOT_ALLOWED"), ("operator", "")):
                shown = Security.in_folder(authority.issue(Subject(kind, "ann")))
                channel = grpc.aio.secure_channel(
                    ready["address"], credentials(Watched(shown.files)), options=named("scoring")
                )
                async with channel:
                    ask = ServerReflectionStub(channel).ServerReflectionInfo(
                        iter([ServerReflectionRequest(list_services="")]), timeout=5
                    )
                    if expected:
                        assert await code_of(ask.read()) is grpc.StatusCode.PERMISSION_DENIED
                    else:
                        assert (await ask.read()).HasField("list_services_response")
            wanted = {"loanmesh.certificate.expiry", "loanmesh.certificate.life_left", "loanmesh.access.denials"}
            await until(lambda: wanted <= set(collected.all()))
        found = collected.all()
        assert found["loanmesh.certificate.expiry"].attributes == {"role"}
        assert found["loanmesh.certificate.life_left"].attributes == {"role"}
        assert found["loanmesh.certificate.life_left"].unit == "{share}"  # Prometheus adds no word for it.
        assert found["loanmesh.access.denials"].attributes == {"reason", "rpc.method"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "SCORING_TLS__CERT_FILE"),
        ({"SCORING_TLS__MODE": "plaintext", "SCORING_SERVER__LISTEN": "0.0.0.0:0"}, "plaintext is for loopback only"),
    ],
)
def test_a_service_without_certificates_does_not_start(settings: dict[str, str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.scoring.main"],
        capture_output=True, text=True, check=False, timeout=30, env={**os.environ, **settings},
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert "loanmesh certs" in done.stderr
    assert "Traceback" not in done.stderr
