"""JSON Web Tokens of internal clients: who they say calls, once signature, issuer, audience and time are right."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jwt
import structlog

from loanmesh.runtime.caller import Caller, is_path
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import Unauthenticated
from loanmesh.runtime.setting_rules import WrongSetting
from loanmesh.runtime.settings import TokenSettings

LEEWAY_S = 30.0
"""How far clocks of issuer and service may be apart."""
TOKENS_REMEMBERED = 1024
"""Tokens whose signature was verified; the least recently used is forgotten, and verified again."""
TOKEN_BYTES_MAX = 8192
UNKNOWN_KEY_LOOK_S = 1.0
"""How often a token with an unknown key makes us look at the key file before its time: an issuer may already use a key
that it has only just published."""
RSA_BITS_MIN = 2048
_ALGORITHMS = {"EC": "ES256", "OKP": "EdDSA", "RSA": "RS256"}
"""The one algorithm of each kind of key. The token does not choose: it could choose `none`, or take a public key for a
shared secret."""
log = structlog.get_logger()


class BadKeys(Exception):
    """A key file cannot be used."""


class Tokens:
    """Verifies tokens with the keys that a file holds, now and later."""

    def __init__(self, settings: TokenSettings, trust_domain: str, clock: Clock) -> None:
        """Raises BadKeys."""
        self._settings = settings
        self._spiffe = f"spiffe://{trust_domain}/"
        self._clock = clock
        self._file = Path(settings.keys_file)
        self._text = ""
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._verified: OrderedDict[str, tuple[Caller, float, float]] = OrderedDict()
        self._looked_at = float("-inf")
        self._complaint = ""
        self._read()

    def caller(self, token: str) -> Caller:
        """Who calls. Raises Unauthenticated, whose text tells what is wrong with the token and never quotes it."""
        now_s = self._clock.now().timestamp()
        known = self._verified.get(token)
        if known is None:
            if len(token) > TOKEN_BYTES_MAX:
                raise Unauthenticated(f"the token is longer than {TOKEN_BYTES_MAX} bytes", reason="TOKEN_INVALID")
            known = self._verify(token)
            self._verified[token] = known
            if len(self._verified) > TOKENS_REMEMBERED:
                self._verified.popitem(last=False)
        else:
            self._verified.move_to_end(token)
        caller, valid_from_s, expires_s = known
        if now_s > expires_s + LEEWAY_S:
            self._verified.pop(token, None)
            raise Unauthenticated("the token has expired; get a new one", reason="TOKEN_EXPIRED")
        if now_s < valid_from_s - LEEWAY_S:
            raise Unauthenticated("the token is not valid yet", reason="TOKEN_NOT_YET_VALID")
        return caller

    def look(self) -> None:
        """Take over the key file where it changed. What cannot be used changes nothing, and is logged once."""
        try:
            self._read()
        except BadKeys as error:
            if self._complaint != str(error):
                self._complaint = str(error)
                log.warning("token_keys_not_replaced", error_type="token_bad_keys", cause=str(error))

    def _verify(self, token: str) -> tuple[Caller, float, float]:
        key = self._key_of(token)
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                audience=self._settings.audience,
                issuer=self._settings.issuer,
                # Times are compared by our clock, each time the token comes.
                options={
                    "require": ["exp", "iss", "aud", "sub"],
                    "verify_exp": False, "verify_nbf": False, "verify_iat": False,
                },
            )  # fmt: skip
            expires_s, valid_from_s = float(claims["exp"]), float(claims.get("nbf", "-inf"))
            if not math.isfinite(expires_s):
                raise ValueError("a token that never ends")
        except jwt.InvalidAudienceError as error:
            raise Unauthenticated("the token is for another audience", reason="TOKEN_AUDIENCE") from error
        except jwt.InvalidIssuerError as error:
            raise Unauthenticated("the token is of another issuer", reason="TOKEN_ISSUER") from error
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks the claim {error.claim}", reason="TOKEN_INVALID") from error
        except (jwt.PyJWTError, TypeError, ValueError, OverflowError) as error:
            raise Unauthenticated("the token's signature or shape is not valid", reason="TOKEN_INVALID") from error
        return Caller(self._path(claims["sub"]), "token"), valid_from_s, expires_s

    def _path(self, subject: Any) -> str:
        """Of a bare name: a client. Services prove themselves by certificates only."""
        path = subject.removeprefix(self._spiffe) if isinstance(subject, str) else ""
        path = path if "/" in path else f"client/{path}"
        if not is_path(path) or path.startswith("ns/"):
            raise Unauthenticated("the token's subject is neither a client nor an operator", reason="TOKEN_SUBJECT")
        return path

    def _key_of(self, token: str) -> jwt.PyJWK:
        try:
            name = jwt.get_unverified_header(token).get("kid")
        except jwt.PyJWTError as error:
            raise Unauthenticated("the token's shape is not valid", reason="TOKEN_INVALID") from error
        key = self._find(name)
        now = self._clock.monotonic()
        if key is None and now - self._looked_at >= UNKNOWN_KEY_LOOK_S:
            self._looked_at = now
            self.look()
            key = self._find(name)
        if key is None:
            raise Unauthenticated("the token is signed by a key that is not known here", reason="TOKEN_KEY")
        return key

    def _find(self, name: str | None) -> jwt.PyJWK | None:
        if name is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(name)

    def _read(self) -> None:
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadKeys(f"{self._file}: {getattr(error, 'strerror', None) or 'is not UTF-8'}") from error
        if text == self._text:
            return
        keys = _keys(self._file, text)
        # A key that is gone must not be believed any longer.
        self._verified.clear()
        self._text, self._keys, self._complaint = text, keys, ""


def _keys(file: Path, text: str) -> dict[str | None, jwt.PyJWK]:
    try:
        entries = json.loads(text)["keys"]
        keys = {}
        for entry in entries:
            kind, name = entry["kty"], entry.get("kid")
            if kind not in _ALGORITHMS:
                raise BadKeys(f"{file}: key {name}: kty {kind} is not allowed; allowed: {', '.join(_ALGORITHMS)}")
            if "d" in entry:
                raise BadKeys(f"{file}: key {name} is a private key; only public keys belong here")
            if name in keys:
                raise BadKeys(f"{file}: two keys are named {name}")
            keys[name] = jwt.PyJWK(entry, algorithm=_ALGORITHMS[kind])
            if kind == "RSA" and keys[name].key.key_size < RSA_BITS_MIN:
                raise BadKeys(f"{file}: key {name} has fewer than {RSA_BITS_MIN} bits")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, jwt.PyJWTError) as error:
        raise BadKeys(f"{file}: is no JSON Web Key Set: {type(error).__name__}") from error
    if not keys:
        raise BadKeys(f"{file}: holds no key")
    return keys


def make_tokens(prefix: str, settings: TokenSettings, trust_domain: str, clock: Clock) -> Tokens | None:
    """None where no key file is set. Raises WrongSetting."""
    if not settings.keys_file:
        return None
    if not settings.issuer:
        raise WrongSetting(f"{prefix}TOKENS__ISSUER", "must be set too, beside the key file", "the tokens' `iss`")
    try:
        return Tokens(settings, trust_domain, clock)
    except BadKeys as error:
        raise WrongSetting(f"{prefix}TOKENS__KEYS_FILE", str(error), "a JSON Web Key Set of public keys") from error
