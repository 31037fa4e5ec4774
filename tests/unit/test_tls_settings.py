"""What a service needs before it starts: certificates, or the explicit wish to do without on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest

from loanmesh.cli.authority import Authority, Subject
from loanmesh.client.transport import GrpcTransport
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.setting_rules import WrongSetting, is_loopback, stays_here
from loanmesh.runtime.settings import AccessSettings, ServerSettings, ServiceSettings, TlsSettings, TokenSettings
from loanmesh.runtime.tls import server_certificates

CLOCK = FakeClock()


def refused(settings: ServiceSettings) -> str:
    with pytest.raises(WrongSetting) as wrong:
        server_certificates("intake", "INTAKE_", settings, CLOCK)
    return str(wrong.value)


def files(folder: Path) -> TlsSettings:
    return TlsSettings(
        cert_file=str(folder / "tls.crt"), key_file=str(folder / "tls.key"), ca_file=str(folder / "ca.crt")
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority(tmp_path / "certs", CLOCK.now)
    made.create("loanmesh")
    return made


def test_without_certificates_and_without_the_wish_for_plaintext_nothing_starts() -> None:
    said = refused(ServiceSettings())
    for word in ("INTAKE_TLS__CERT_FILE", "loanmesh certs issue service intake", "INTAKE_TLS__MODE=plaintext"):
        assert word in said


@pytest.mark.parametrize(
    ("listen", "loopback"),
    [
        ("127.0.0.1:1", True), ("127.0.0.9:1", True), ("[::1]:1", True), ("localhost:1", True),
        ("0.0.0.0:1", False), ("[::]:1", False), ("10.0.0.1:1", False), ("intake:1", False),
        ("127.evil.example:1", False),
    ],
)  # fmt: skip
def test_plaintext_is_for_loopback_only(listen: str, loopback: bool) -> None:
    settings = ServiceSettings(tls=TlsSettings(mode="plaintext"), server=ServerSettings(listen=listen))
    assert is_loopback(listen) is loopback
    if loopback:
        assert server_certificates("intake", "INTAKE_", settings, CLOCK) is None
    else:
        assert f"plaintext is for loopback only, and INTAKE_SERVER__LISTEN is {listen}" in refused(settings)


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:1", True), ("127.0.0.1:1,127.0.0.2:1", True), ("localhost:1", True), ("unix:/run/x", True),
        ("dns://127.0.0.1:7401/bureau.loanmesh:7402", True), ("ipv4:127.0.0.1:1", True), ("dns:localhost:1", True),
        ("10.0.0.1:1", False), ("127.0.0.1:1,10.0.0.1:1", False), ("dns:///bureau:7402", False), ("bureau:1", False),
        ("dns://10.0.0.1:53/localhost:1", False), ("ipv6:[2001:db8::1]:1", False),
    ],
)  # fmt: skip
def test_plaintext_does_not_leave_the_machine(target: str, here: bool) -> None:
    assert stays_here(target) is here
    if not here:
        with pytest.raises(WrongSetting, match="plaintext is for loopback only"):
            open_channel(target, CLOCK, lambda _: 1.0, service="bureau", tls=TlsSettings(mode="plaintext"))
        with pytest.raises(ValueError, match="is not on this machine"):
            GrpcTransport(target)


def test_files_that_do_not_fit_are_named_by_their_setting(authority: Authority, tmp_path: Path) -> None:
    ours = authority.issue(Subject("service", "intake"))
    other = authority.issue(Subject("service", "bureau"))
    assert server_certificates("intake", "INTAKE_", ServiceSettings(tls=files(ours)), CLOCK)
    wrong_key = files(ours).model_copy(update={"key_file": str(other / "tls.key")})
    assert refused(ServiceSettings(tls=wrong_key)).startswith("INTAKE_TLS__KEY_FILE: ")
    no_ca = files(ours).model_copy(update={"ca_file": str(tmp_path / "nowhere")})
    assert refused(ServiceSettings(tls=no_ca)).startswith("INTAKE_TLS__CA_FILE: ")
    elsewhere = files(ours).model_copy(update={"trust_domain": "elsewhere"})
    assert "allowed: spiffe://elsewhere/ns/NAMESPACE/sa/intake" in refused(ServiceSettings(tls=elsewhere))


def test_tokens_need_tls_keys_and_an_issuer(authority: Authority) -> None:
    tls = files(authority.issue(Subject("service", "intake")))
    keys = TokenSettings(keys_file="/nowhere/keys.json", issuer="https://issuer.example")
    for settings, said in (
        (ServiceSettings(tls=tls, server=ServerSettings(token_listen="127.0.0.1:0")), "INTAKE_SERVER__TOKEN_LISTEN"),
        (ServiceSettings(tls=TlsSettings(mode="plaintext"), tokens=keys), "tokens need TLS"),
        (ServiceSettings(tls=tls, tokens=keys.model_copy(update={"issuer": ""})), "INTAKE_TOKENS__ISSUER"),
        (ServiceSettings(tls=tls, tokens=keys), "INTAKE_TOKENS__KEYS_FILE: /nowhere/keys.json"),
        (ServiceSettings(tls=tls, access=AccessSettings(table_file="/nowhere")), "INTAKE_ACCESS__TABLE_FILE: /nowhere"),
    ):
        assert said in refused(settings)
