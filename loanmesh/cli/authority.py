"""A certificate authority in a folder, for one machine: laptops, tests, small sites. A cluster has cert-manager.

FOLDER/ca.crt              what everybody believes: the CA that signs, and another while one replaces the other
FOLDER/ca.key              readable by its owner only, as all keys
FOLDER/KIND/NAME/          tls.crt, tls.key, ca.crt of one service, client or operator: hand out this folder
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loanmesh.runtime.certificates import BadCertificate, Files, Material, identity_of, is_signed_by, read

KINDS = {"service": "services", "client": "clients", "operator": "operators"}
LIFE = dt.timedelta(hours=24)
"""Of what is issued. Short, so that a key that leaks is of little use, and renewing is practised daily."""
CA_LIFE = dt.timedelta(days=90)
BACKDATED = dt.timedelta(minutes=5)
"""Clocks differ."""
RENEW_SHARE = 1 / 3
"""Share of its life left at which a certificate is renewed, as cert-manager does."""


class CannotIssue(Exception):
    """What was asked cannot be done; the text says why and what to do instead."""


@dataclass(frozen=True)
class Subject:
    """Whom a certificate is for."""

    kind: str
    """service, client or operator."""
    name: str
    namespace: str = "loanmesh"
    """Of a service."""
    dns: tuple[str, ...] = ()
    """Names of a service under which it is reached, besides its own."""

    def identity(self, trust_domain: str) -> str:
        """Its SPIFFE ID."""
        path = f"ns/{self.namespace}/sa/{self.name}" if self.kind == "service" else f"{self.kind}/{self.name}"
        return f"spiffe://{trust_domain}/{path}"

    @property
    def host_names(self) -> tuple[str, ...]:
        """What a service's certificate states as DNS names; nobody connects to the others."""
        if self.kind != "service":
            return ()
        inside = (f"{self.name}.loanmesh", f"{self.name}.{self.namespace}.svc")
        return tuple(dict.fromkeys((self.name, *inside, "localhost", *self.dns)))


class Authority:
    """The CA of one folder."""

    def __init__(self, folder: Path, now: Callable[[], dt.datetime]) -> None:
        self._folder = folder
        self._now = now

    @property
    def bundle(self) -> Path:
        """The certificates that everybody believes, the signing one first."""
        return self._folder / "ca.crt"

    @property
    def _key(self) -> Path:
        return self._folder / "ca.key"

    def exists(self) -> bool:
        """Whether there is one."""
        return self._key.exists() or self.bundle.exists()

    def create(self, trust_domain: str, life: dt.timedelta = CA_LIFE) -> None:
        """Make it. Raises CannotIssue where there is one."""
        if self.exists():
            raise CannotIssue(f"{self._folder} holds a CA already; `loanmesh certs rotate-ca` replaces it step by step")
        self._make(trust_domain, life, [])

    def replace(self, life: dt.timedelta = CA_LIFE) -> None:
        """A new CA signs from now on; the one before is believed until `retire`, so that nothing fails meanwhile.
        Everybody's ca.crt is written with both: first believe, then show."""
        before = self._certificates()
        if len(before) > 1:
            raise CannotIssue("the CA before is still believed; renew all, then `loanmesh certs retire-ca`")
        self._make(self.trust_domain, life, before)
        self._hand_out()

    def retire(self) -> int:
        """Believe in the signing CA only. Raises CannotIssue where a certificate of the one before is still in use;
        answers how many CAs were dropped."""
        signing, *before = self._certificates()
        for files in self.issued():
            leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes()) if files.certificate else None
            if leaf and not is_signed_by(leaf, signing):
                raise CannotIssue(
                    f"{files.certificate} is signed by the CA that would go; first `loanmesh certs renew --all`"
                )
        _write(self.bundle, signing.public_bytes(Encoding.PEM))
        self._hand_out()
        return len(before)

    @property
    def trust_domain(self) -> str:
        """Whose identities it states."""
        names = self._certificates()[0].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        return str(names[0].value)

    def issue(self, subject: Subject, life: dt.timedelta = LIFE, *, overwrite: bool = False) -> Path:
        """A new key and certificate in a folder of the subject's own. Raises CannotIssue where there is one already and
        `overwrite` is not said."""
        folder = self._folder / KINDS[subject.kind] / subject.name
        if not overwrite and (folder / "tls.key").exists():
            raise CannotIssue(
                f"{folder} holds a certificate already; `loanmesh certs renew` renews it, --overwrite replaces it"
            )
        signing = self._certificates()[0]
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._now()
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(subject.identity(self.trust_domain))]
        names += [x509.DNSName(name) for name in subject.host_names]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        usages += [ExtendedKeyUsageOID.SERVER_AUTH] if subject.kind == "service" else []
        made = (
            x509.CertificateBuilder()
            # Identity is in the names; a subject beside them would only be something else to disagree with.
            .subject_name(x509.Name([]))
            .issuer_name(signing.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(min(now + life, signing.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False  # type: ignore[arg-type]  # Ours is an EC key.
            )
            .sign(self._signing_key(), hashes.SHA256())
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # First believe, then show; certificate and key are noticed together, when they fit.
        _write(folder / "ca.crt", self.bundle.read_bytes())
        _write(folder / "tls.key", _pem(key), secret=True)
        _write(folder / "tls.crt", made.public_bytes(Encoding.PEM))
        return folder

    def issued(self) -> Iterator[Files]:
        """All that it gave out."""
        for kind in KINDS.values():
            yield from (Files.in_folder(path.parent) for path in sorted((self._folder / kind).glob("*/tls.crt")))

    def renew(self, *, all_: bool, names: Sequence[str] = ()) -> list[Path]:
        """New keys and certificates for those with less than a third of their life left, or for all; only for `names`
        where some are given. They live as long as the ones before were made for. Answers their folders."""
        renewed = []
        for files in self.issued():
            material = read(files)
            assert files.certificate
            assert material.valid_from
            assert material.expires_at
            name = files.certificate.parent.name
            life = material.expires_at - material.valid_from
            if (names and name not in names) or not (all_ or material.expires_at - self._now() < life * RENEW_SHARE):
                continue
            renewed.append(self.issue(_subject(files.certificate), life - BACKDATED, overwrite=True))
        return renewed

    def state(self) -> list[tuple[Path, Material]]:
        """What everybody's folder holds. Raises BadCertificate."""
        return [(files.certificate.parent, read(files)) for files in self.issued() if files.certificate]

    def _make(self, trust_domain: str, life: dt.timedelta, before: Sequence[x509.Certificate]) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        now = self._now()
        # The name tells a CA from the one before it, as whoever verifies looks for it by name.
        number = x509.random_serial_number()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} CA {number:x}"[:64]),
            ]
        )
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(number)
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(self._key, _pem(key), secret=True)
        _write(self.bundle, b"".join(one.public_bytes(Encoding.PEM) for one in (made, *before)))

    def _hand_out(self) -> None:
        for files in self.issued():
            _write(files.ca, self.bundle.read_bytes())

    def _certificates(self) -> list[x509.Certificate]:
        try:
            return x509.load_pem_x509_certificates(self.bundle.read_bytes())
        except OSError as error:
            raise CannotIssue(f"{self._folder} holds no CA; `loanmesh certs init` makes one") from error
        except ValueError as error:
            raise CannotIssue(f"{self.bundle} holds no certificate in PEM") from error

    def _signing_key(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = load_pem_private_key(self._key.read_bytes(), None)
        except (OSError, ValueError, TypeError) as error:
            raise CannotIssue(f"{self._key} cannot be read as a key; without it nothing can be signed") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise CannotIssue(f"{self._key} is not a key of `loanmesh certs init`")
        return key


def _subject(certificate: Path) -> Subject:
    """Whom a certificate of ours is for."""
    leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
    words = identity_of(leaf).removeprefix("spiffe://").split("/")[1:]
    match words:
        case ["ns", namespace, "sa", name]:
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            return Subject("service", name, namespace, tuple(names.get_values_for_type(x509.DNSName)))
        case [("client" | "operator") as kind, name]:
            return Subject(kind, name)
    raise BadCertificate("certificate", certificate, "states no identity of a service, client or operator")


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """At once or not at all, so that nobody ever reads half of it; never readable by others, where secret."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)
    new.replace(path)
