"""TLS of servers: what they listen with, and refusing to start without it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import grpc
from opentelemetry import metrics

from loanmesh.runtime.authorisation import Authorisation, load_table
from loanmesh.runtime.certificates import BadCertificate, ExpiryWatch, Files, Material, Watched
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.door import Door
from loanmesh.runtime.lasting import Lasting
from loanmesh.runtime.setting_rules import WrongSetting, is_loopback
from loanmesh.runtime.settings import ServiceSettings, TlsSettings
from loanmesh.runtime.tokens import Tokens, make_tokens

CERTIFICATE_EXPIRY = "loanmesh.certificate.expiry"
"""Seconds until expiry, by `role`: certificate (our own) or ca (the last of those we believe)."""
CERTIFICATE_LIFE_LEFT = "loanmesh.certificate.life_left"
"""Share of our certificate's life that is left: says that renewal does not work, however long certificates live."""


def files_of(settings: TlsSettings) -> Files:
    """The files that the settings name; all three are set."""
    return Files(Path(settings.ca_file), Path(settings.cert_file), Path(settings.key_file))


def server_certificates(name: str, prefix: str, settings: ServiceSettings, clock: Clock) -> ServerCertificates | None:
    """What service `name` listens with; None for plaintext, which is allowed on loopback only.

    prefix  of its settings' names, for the errors. Raises WrongSetting.
    """
    tls, tokens = settings.tls, settings.tokens
    if settings.server.token_listen and not tokens.keys_file:
        raise WrongSetting(f"{prefix}TOKENS__KEYS_FILE", f"must be set too, beside {prefix}SERVER__TOKEN_LISTEN")
    if tls.mode == "plaintext":
        if tokens.keys_file:
            raise WrongSetting(f"{prefix}TOKENS__KEYS_FILE", f"tokens need TLS, and {prefix}TLS__MODE is plaintext")
        if not is_loopback(settings.server.listen):
            raise WrongSetting(
                f"{prefix}TLS__MODE",
                f"plaintext is for loopback only, and {prefix}SERVER__LISTEN is {settings.server.listen}",
                f"mtls; or listen on 127.0.0.1. {_how(name)}",
            )
        return None
    required = {"CERT_FILE": tls.cert_file, "KEY_FILE": tls.key_file, "CA_FILE": tls.ca_file}
    if missing := [f"{prefix}TLS__{knob}" for knob, value in required.items() if not value]:
        raise WrongSetting(
            ", ".join(missing),
            "not set, and without a certificate the service does not start",
            f"a file each. {_how(name)} On loopback, {prefix}TLS__MODE=plaintext does without",
        )
    try:
        watched = Watched(files_of(tls))
    except BadCertificate as error:
        knob = {"certificate": "CERT_FILE", "key": "KEY_FILE", "ca": "CA_FILE"}[error.role]
        raise WrongSetting(f"{prefix}TLS__{knob}", str(error), "a PEM file. " + _how(name)) from error
    expected = f"spiffe://{tls.trust_domain}/"
    identity = watched.material.identity
    if not identity.startswith(expected):
        stated = f"states {identity or 'no SPIFFE ID'}"
        raise WrongSetting(f"{prefix}TLS__CERT_FILE", f"{tls.cert_file}: {stated}", f"{expected}ns/NAMESPACE/sa/{name}")
    words = identity.removeprefix(expected).split("/")
    namespace = words[1] if words[0] == "ns" and len(words) > 1 else ""
    table = load_table(f"{prefix}ACCESS__TABLE_FILE", settings.access.table_file)
    taken = make_tokens(prefix, tokens, tls.trust_domain, clock)
    door = Door(Authorisation(table, namespace), taken, tls.trust_domain, clock)
    return ServerCertificates(watched, door, taken, tls.reload_s, clock)


def _how(name: str) -> str:
    return f"`loanmesh certs init` and `loanmesh certs issue service {name}` make certificates."


class ServerCertificates:
    """What a server shows in each handshake: always what the files held at the last look."""

    def __init__(self, watched: Watched, door: Door, tokens: Tokens | None, reload_s: float, clock: Clock) -> None:
        self._watched = watched
        self._door = door
        self._tokens = tokens
        self._reload_s = reload_s
        self._clock = clock
        self._expiry = ExpiryWatch(clock.now)
        meter = metrics.get_meter("loanmesh")
        meter.create_observable_gauge(
            CERTIFICATE_EXPIRY, [self._observe], unit="s", description="Seconds until a certificate expires"
        )
        meter.create_observable_gauge(
            CERTIFICATE_LIFE_LEFT,
            [self._observe_share],
            unit="{share}",
            description="Share of its life left",
        )

    @property
    def material(self) -> Material:
        """What is shown and believed now."""
        return self._watched.material

    def door(self) -> Door:
        """Who decides about those who come in."""
        return self._door

    def credentials(self, client_certificates: bool = True) -> grpc.ServerCredentials:
        """For one port. Without client certificates, callers must prove themselves by something else."""
        shown = self._watched.material

        def newest() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks in each handshake, from a thread of its own; None: as before.
            nonlocal shown
            material = self._watched.material
            if material is shown:
                return None
            shown = material
            return _configuration(material)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown),
            newest,  # type: ignore[arg-type]  # The stubs do not know that None means: as before.
            require_client_authentication=client_certificates,
        )

    async def watch_forever(self) -> None:
        """Look at the files every `reload_s` seconds; warn of what expires."""
        expiry, files, tokens = Lasting("certificate_expiry"), Lasting("certificate_files"), Lasting("token_keys")
        while True:
            with expiry:
                self._expiry.check(self._watched.material)
            await self._clock.sleep(self._reload_s)
            with files:
                self._watched.look()
            with tokens:
                if self._tokens:
                    self._tokens.look()

    def _observe(self, options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        now, material = self._clock.now(), self._watched.material
        yield metrics.Observation((material.ca_expires_at - now).total_seconds(), {"role": "ca"})
        if (left_s := material.left_s(now)) is not None:
            yield metrics.Observation(left_s, {"role": "certificate"})

    def _observe_share(self, options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        if (share := self._watched.material.left_share(self._clock.now())) is not None:
            yield metrics.Observation(share, {"role": "certificate"})


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key_pem, material.certificate_pem)], material.ca_pem)
