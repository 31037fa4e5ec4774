"""An issuer of tokens for tests: keys, the file of their public halves, and tokens with whatever claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from loanmesh.runtime.clock import Clock

ISSUER, AUDIENCE = "https://issuer.example", "loanmesh"
_MAKERS: dict[str, tuple[Any, Any]] = {
    "ES256": (lambda: ec.generate_private_key(ec.SECP256R1()), ECAlgorithm),
    "EdDSA": (ed25519.Ed25519PrivateKey.generate, OKPAlgorithm),
    "RS256": (lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048), RSAAlgorithm),
}


class Issuer:
    """Signs with its newest key; publishes the public halves of all in `file`."""

    def __init__(self, file: Path, clock: Clock, algorithm: str = "ES256") -> None:
        self.file = file
        self._clock = clock
        self._keys: dict[str, tuple[str, Any]] = {}
        self.new_key("first", algorithm)

    def new_key(self, name: str, algorithm: str = "ES256", *, publish: bool = True) -> None:
        self._keys[name] = (algorithm, _MAKERS[algorithm][0]())
        if publish:
            self.publish()

    def drop_key(self, name: str) -> None:
        del self._keys[name]
        self.publish()

    def public(self, name: str) -> dict[str, Any]:
        algorithm, key = self._keys[name]
        shown: dict[str, Any] = json.loads(_MAKERS[algorithm][1].to_jwk(key.public_key()))
        return {**shown, "kid": name, "use": "sig"}

    def publish(self) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps({"keys": [self.public(name) for name in self._keys]}))
        new.replace(self.file)

    def token(self, subject: object = "local", *, life_s: float = 300.0, **claims: Any) -> str:
        name = next(reversed(self._keys))
        algorithm, key = self._keys[name]
        now_s = int(self._clock.now().timestamp())
        whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "exp": now_s + life_s, "nbf": now_s, **claims}
        kept = {key: value for key, value in whole.items() if value is not None}
        return jwt.encode(kept, key, algorithm=algorithm, headers={"kid": name})
