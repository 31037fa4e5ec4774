"""Certificates in files: what they say, whether they fit together, and noticing that they were replaced."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

EXPIRY_WARNING_SHARE = 0.25
"""Share of its life left at which a certificate is warned of. cert-manager renews at a third, so nothing is said when
all goes well."""
_UNREADABLE = (
    ValueError, UnsupportedAlgorithm, InternalError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)  # fmt: skip
"""What asking a certificate for its parts may raise, whoever wrote it."""
log = structlog.get_logger()


class BadCertificate(ValueError):
    """A file cannot be used: `role` (certificate, key or ca), and why, in words for whoever put it there."""

    def __init__(self, role: str, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.role = role
        self.path = path
        self.why = why


@dataclass(frozen=True)
class Files:
    """Where they are. Without certificate and key: one who believes others, but shows nothing himself."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path) -> Files:
        """Under the names that cert-manager gives them."""
        return cls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")


@dataclass(frozen=True, repr=False)
class Material:
    """What the files held when they were read; certificate and key fit together."""

    ca_pem: bytes
    ca_expires_at: dt.datetime
    certificate_pem: bytes = b""
    key_pem: bytes = b""
    """Not to be shown, nor logged."""
    identity: str = ""
    """The SPIFFE ID that the certificate states; empty where it states none."""
    valid_from: dt.datetime | None = None
    expires_at: dt.datetime | None = None

    def left_s(self, now: dt.datetime) -> float | None:
        """Seconds until the certificate expires; negative afterwards; None without a certificate."""
        return (self.expires_at - now).total_seconds() if self.expires_at else None

    def left_share(self, now: dt.datetime) -> float | None:
        """The share of its life that the certificate has left, negative afterwards; None without a certificate."""
        if not self.expires_at or not self.valid_from:
            return None
        return (self.expires_at - now) / (self.expires_at - self.valid_from)

    def expires_soon(self, now: dt.datetime) -> bool:
        """Whether it is time to warn."""
        share = self.left_share(now)
        return share is not None and share < EXPIRY_WARNING_SHARE

    def is_believed(self) -> bool:
        """Whether one of our own CAs signed the certificate, or the last of those that stand behind it."""
        last = x509.load_pem_x509_certificates(self.certificate_pem)[-1]
        return any(is_signed_by(last, one) for one in x509.load_pem_x509_certificates(self.ca_pem))


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the CA's key made the signature; one of a kind unknown here made none that we can tell."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_UNREADABLE, TypeError, InvalidSignature):
        return False
    return True


def read(files: Files) -> Material:
    """What the files hold now. Raises BadCertificate, also where a certificate and its key are not of one pair: half of
    a replacement, or a mistake."""
    authorities = _certificates("ca", files.ca)
    ca_pem = files.ca.read_bytes()
    # The last one counts: while a CA is replaced, an old one may expire in peace.
    ca_expires_at = max(one.not_valid_after_utc for one in authorities)
    if files.certificate is None or files.key is None:
        return Material(ca_pem, ca_expires_at)
    chain = _certificates("certificate", files.certificate)
    key_pem = _bytes("key", files.key)
    try:
        key = load_pem_private_key(key_pem, None)
    except (*_UNREADABLE, TypeError) as error:
        # The cause may quote the key.
        raise BadCertificate("key", files.key, "is no unencrypted private key in PEM") from error.with_traceback(None)
    leaf = chain[0]
    shape = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        is_pair = key.public_key().public_bytes(*shape) == leaf.public_key().public_bytes(*shape)
        identity = identity_of(leaf)
    except _UNREADABLE as error:
        # They are parsed when they are asked for, not when they are loaded.
        raise BadCertificate("certificate", files.certificate, f"cannot be read: {type(error).__name__}") from error
    if not is_pair:
        raise BadCertificate("key", files.key, f"is not the key of {files.certificate}")
    return Material(
        ca_pem,
        ca_expires_at,
        b"".join(one.public_bytes(Encoding.PEM) for one in chain),
        key_pem,
        identity,
        leaf.not_valid_before_utc,
        leaf.not_valid_after_utc,
    )


def identity_of(certificate: x509.Certificate) -> str:
    """The one SPIFFE ID that it states; empty where it states none, or several, which is none.

    Raises one of _UNREADABLE where its extensions cannot be parsed.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return uris[0] if len(uris) == 1 and uris[0].startswith("spiffe://") else ""


def _bytes(role: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadCertificate(role, path, error.strerror or "cannot be read") from error


def _certificates(role: str, path: Path) -> list[x509.Certificate]:
    content = _bytes(role, path)
    try:
        return x509.load_pem_x509_certificates(content)
    except _UNREADABLE as error:
        raise BadCertificate(role, path, "holds no certificate in PEM") from error


class Watched:
    """Files, and what they held when they last were sound. Looked at by its owner, now and then."""

    def __init__(self, files: Files) -> None:
        """Raises BadCertificate."""
        self._files = files
        self._seen = self._stamp()
        self.material = read(files)
        self._unsound: object = None
        self._complaint = ""

    def look(self) -> bool:
        """Whether they were replaced. Files that do not fit together, or cannot be read, change nothing: what was
        sound stays in force, and the next look tries again; where that finds them still the same, and not just caught
        half-way, the cause is logged once."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            material = read(self._files)
        except BadCertificate as error:
            seen_before, self._unsound = self._unsound == stamp, stamp
            if seen_before and self._complaint != str(error):
                self._complaint = str(error)
                log.warning("certificate_not_replaced", error_type="tls_bad_file", role=error.role, cause=str(error))
            return False
        self._seen, self._unsound, self._complaint = stamp, None, ""
        replaced, self.material = material != self.material, material
        if replaced:
            log.info("certificate_replaced", identity=material.identity, expires_at=str(material.expires_at))
        return replaced

    def _stamp(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._files.ca, self._files.certificate, self._files.key))


def _stamp(path: Path | None) -> object:
    """Changes with each replacement, also by a symbolic link that is turned, as a cluster does it."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_ino, found.st_size) if found else None


class ExpiryWatch:
    """Says in the log that a certificate expires, before and after; once each."""

    def __init__(self, now: Callable[[], dt.datetime]) -> None:
        self._now = now
        self._said: tuple[object, ...] = ()

    def check(self, material: Material) -> None:
        """Warn where it is time."""
        now = self._now()
        left_s = material.left_s(now)
        if left_s is None or not material.expires_soon(now):
            return
        expired = left_s <= 0
        about = (material.expires_at, expired)
        if about == self._said:
            return
        self._said = about
        log.warning(
            "certificate_expired" if expired else "certificate_expires_soon",
            error_type="tls_own_certificate_expired" if expired else "tls_own_certificate_expires",
            identity=material.identity,
            expires_at=str(material.expires_at),
            left_s=round(left_s),
        )
