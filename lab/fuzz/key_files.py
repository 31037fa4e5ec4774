"""Odd files of keys and certificates: what cryptography's native code is given to read."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.utils import CryptographyDeprecationWarning
from jwt.algorithms import ECAlgorithm, OKPAlgorithm

from lab.fuzz import texts
from lab.fuzz.refused import Refused
from loanmesh.runtime import certificates, keys
from loanmesh.runtime.certificates import BadCertificate, Files
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import Unauthenticated
from loanmesh.runtime.settings import TokenSettings
from loanmesh.runtime.tokens import BadKeys, Tokens

NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)
Reader = Callable[[bytes], None]
Mutate = Callable[[str, random.Random], bytes]
_EC = ec.derive_private_key(2026_11_24, ec.SECP256R1())
_ED = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
"""Keys that are the same in each run, and keep nothing secret."""


def kinds() -> dict[str, tuple[str, Mutate, Reader]]:
    """Each kind of file: what it is when sound, how it is mutated, how it is read."""
    return {
        "keys of tokens": (_token_keys(), texts.json_file, token_keys),
        "keys of personal data": (_key_ring(), texts.json_file, key_ring),
        "certificate": (_certificate(), texts.pem, certificate),
    }


def token_keys(data: bytes) -> None:
    """The public keys of whoever issues tokens; tokens of nobody, for each of them, are refused."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        file.write_bytes(data)
        try:
            tokens = Tokens(TokenSettings(keys_file=str(file), issuer="x"), "loanmesh", FakeClock(NOW))
        except BadKeys as error:
            raise Refused(str(error)) from error
        for name in ("first", "second", "third"):
            for algorithm in ("ES256", "EdDSA", "RS256", "none"):
                head = json.dumps({"alg": algorithm, "kid": name}).encode()
                token = ".".join(
                    base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (head, b"{}", b"x" * 64)
                )
                with contextlib.suppress(Unauthenticated):
                    raise AssertionError(f"believed: {tokens.caller(token)}")


def key_ring(data: bytes) -> None:
    """The keys that seal personal data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        file.write_bytes(data)
        try:
            ring = keys.read_ring(file)
        except keys.WrongKeys as error:
            raise Refused(str(error)) from error
        keys.write_ring(file, ring)
        assert keys.read_ring(file) == ring


def certificate(data: bytes) -> None:
    """A certificate with its key, and the CA: each of the three is the mutant in its turn."""
    refused = []
    for mutant in ("ca.crt", "tls.crt", "tls.key"):
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            for name in ("ca.crt", "tls.crt", "tls.key"):
                (Path(folder) / name).write_bytes(data if name == mutant else _certificate().encode())
            try:
                # Of what cryptography still reads today, it warns.
                warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                material = certificates.read(Files.in_folder(Path(folder)))
                material.is_believed()
                material.expires_soon(NOW)
            except BadCertificate as error:
                refused.append(str(error))
    if refused:
        raise Refused("; ".join(refused))


def _token_keys() -> str:
    shown = [
        {**json.loads(ECAlgorithm.to_jwk(_EC.public_key())), "kid": "first"},
        {**json.loads(OKPAlgorithm.to_jwk(_ED.public_key())), "kid": "second"},
        {"kty": "RSA", "kid": "third", "e": "AQAB", "n": base64.urlsafe_b64encode(b"\xc5" * 256).decode().rstrip("=")},
    ]
    return json.dumps({"keys": shown})


def _key_ring() -> str:
    dice = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.json"
        keys.write_ring(file, keys.new_ring(NOW, dice.randbytes))
        return file.read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _certificate() -> str:
    """One that signed itself, and its key, in one file."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fuzz")])
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier("spiffe://loanmesh/ns/loanmesh/sa/intake"), x509.DNSName("intake"),
    ]  # fmt: skip
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(_ED.public_key())
        .serial_number(1)
        .not_valid_before(NOW - dt.timedelta(days=1))
        .not_valid_after(NOW + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(_ED, None)
    )
    key = _ED.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return (made.public_bytes(Encoding.PEM) + key).decode()
