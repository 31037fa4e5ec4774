"""Tokens on a port that asks for no certificate, and beside one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from loanmesh.client import CallFailed, Client, Security
from loanmesh.runtime.settings import TokenSettings
from tests.builders import an_application
from tests.integration.secured import CLOCK, NAME, Secured, secured, status_of
from tests.tokens import ISSUER, Issuer


@pytest.fixture
def issuer(tmp_path: Path) -> Issuer:
    return Issuer(tmp_path / "keys.json", CLOCK)


@pytest.fixture
async def mesh(tmp_path: Path, issuer: Issuer) -> AsyncIterator[Secured]:
    tokens = TokenSettings(keys_file=str(issuer.file), issuer=ISSUER)
    async with secured(tmp_path / "certs", tokens=tokens) as made:
        yield made


async def refusal(mesh: Secured, token: Any) -> tuple[str, str]:
    async with Client(mesh.token_address, security=mesh.believing(token=token)) as client:
        with pytest.raises(CallFailed) as failed:
            await client.get(NAME)
    assert mesh.intake.callers == []
    return failed.value.code, failed.value.reason


async def test_a_token_alone_says_who_calls(mesh: Secured, issuer: Issuer) -> None:
    security = mesh.believing(token=issuer.token("local"))
    async with Client(mesh.token_address, client_id="somebody-else", security=security) as client:
        await client.submit(an_application())
        await client.get(NAME)
        assert [application.revision async for application in client.watch(NAME)] == [1]
    assert mesh.intake.callers == ["local", "client/local"]


async def test_without_a_token_nobody_calls_there(mesh: Secured, issuer: Issuer) -> None:
    assert await refusal(mesh, None) == ("UNAUTHENTICATED", "NO_IDENTITY")
    assert await refusal(mesh, issuer.token(life_s=-3600.0)) == ("UNAUTHENTICATED", "TOKEN_EXPIRED")
    assert await refusal(mesh, issuer.token(aud="another")) == ("UNAUTHENTICATED", "TOKEN_AUDIENCE")
    assert await refusal(mesh, issuer.token("stranger")) == ("PERMISSION_DENIED", "LENDER_NOT_ALLOWED")
    assert await refusal(mesh, "nonsense") == ("UNAUTHENTICATED", "TOKEN_INVALID")


async def test_a_stranger_is_refused_before_the_message_comes(mesh: Secured, issuer: Issuer) -> None:
    never = asyncio.Event()

    async def message() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    ca = grpc.ssl_channel_credentials((mesh.folder / "ca.crt").read_bytes())
    named = (("grpc.ssl_target_name_override", "intake"),)
    async with grpc.aio.secure_channel(mesh.token_address, ca, options=named) as channel:
        # A stream for us, so that gRPC begins the call without its message; the server knows the method as it is.
        submit: Any = channel.stream_unary("/lending.intake.v1.IntakeService/SubmitApplication")
        for metadata in ((), (("authorization", "Bearer nonsense"),)):
            assert await status_of(submit(message(), metadata=metadata, timeout=10)) is grpc.StatusCode.UNAUTHENTICATED
    assert mesh.intake.callers == []


async def test_its_messages_are_smaller_than_those_of_who_has_a_certificate(mesh: Secured, issuer: Issuer) -> None:
    by_token, by_certificate = mesh.believing(token=issuer.token("local")), mesh.security("client", "local")
    between = an_application()
    between.channel = "x" * (5 << 20)
    async with Client(mesh.token_address, security=by_token) as client:
        with pytest.raises(CallFailed, match="larger than"):
            await client.submit(between)
        await client.submit(an_application())
    assert mesh.intake.callers == ["local"]
    async with Client(mesh.address, security=by_certificate) as client:
        # Taken, and then refused for what it says.
        with pytest.raises(CallFailed, match="channel"):
            await client.submit(between)


async def test_health_is_told_to_strangers_without_taking_what_they_send(mesh: Secured) -> None:
    never = asyncio.Event()

    async def message() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    ca = grpc.ssl_channel_credentials((mesh.folder / "ca.crt").read_bytes())
    named = (("grpc.ssl_target_name_override", "intake"),)
    read = health_pb2.HealthCheckResponse.FromString
    async with grpc.aio.secure_channel(mesh.token_address, ca, options=named) as channel:
        for method in ("Check", "Watch"):
            call: Any = channel.stream_stream(f"/grpc.health.v1.Health/{method}", response_deserializer=read)
            told = await anext(aiter(call(message(), timeout=10)))
            assert told.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_certificate_does_not_count_where_none_is_asked_for(mesh: Secured) -> None:
    async with Client(mesh.token_address, security=mesh.security("client", "local")) as client:
        with pytest.raises(CallFailed, match="nobody is proven"):
            await client.get(NAME)


async def test_a_gateway_passes_on_whom_it_speaks_for(mesh: Secured, issuer: Issuer) -> None:
    security = mesh.security("client", "gateway", token=issuer.token("local"))
    async with Client(mesh.address, security=security) as client:
        await client.submit(an_application())
    assert mesh.intake.callers == ["local"]


async def test_a_bad_token_is_not_made_good_by_a_certificate(mesh: Secured, issuer: Issuer) -> None:
    security = mesh.security("client", "local", token=issuer.token("local", life_s=-3600.0))
    async with Client(mesh.address, security=security) as client:
        with pytest.raises(CallFailed, match="has expired"):
            await client.get(NAME)


async def refused(mesh: Secured, security: Security) -> str:
    """Why, once the service has looked at its keys."""
    async with Client(mesh.token_address, security=security) as client, asyncio.timeout(10):
        while True:
            try:
                await client.get(NAME)
            except CallFailed as failed:
                return failed.reason


async def test_a_token_is_read_again_when_its_file_changes_or_asked_for_each_time(
    mesh: Secured, issuer: Issuer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(issuer.token("local") + "\n")
    async with Client(mesh.token_address, security=mesh.believing(token=file)) as client:
        await client.get(NAME)
        first = mesh.believing(token=issuer.token("local"))
        issuer.new_key("second")
        new = tmp_path / "new"
        new.write_text(issuer.token("local"))
        new.replace(file)
        issuer.drop_key("first")
        assert await refused(mesh, first) == "TOKEN_KEY"
        await client.get(NAME)
        file.unlink()
        await client.get(NAME)
    async with Client(mesh.token_address, security=mesh.believing(token=lambda: issuer.token("local"))) as client:
        await client.get(NAME)
