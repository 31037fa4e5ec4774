"""Tokens: whoever they name calls, if and only if everything about them is right; and nobody else by any trick."""

from __future__ import annotations

import base64
import hmac
import json
from pathlib import Path
from typing import Any

import jwt
import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import Unauthenticated
from loanmesh.runtime.settings import TokenSettings
from loanmesh.runtime.tokens import LEEWAY_S, TOKENS_REMEMBERED, BadKeys, Tokens
from tests.tokens import AUDIENCE, ISSUER, Issuer


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def issuer(tmp_path: Path, clock: FakeClock) -> Issuer:
    return Issuer(tmp_path / "keys.json", clock)


def verifier(issuer: Issuer, clock: FakeClock) -> Tokens:
    settings = TokenSettings(keys_file=str(issuer.file), issuer=ISSUER, audience=AUDIENCE)
    return Tokens(settings, "loanmesh", clock)


def reason(tokens: Tokens, token: str) -> str:
    """Why it is refused; what is said never quotes it."""
    with pytest.raises(Unauthenticated) as refused:
        tokens.caller(token)
    assert token[:20] not in str(refused.value) or not token[:20]
    return refused.value.reason


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256"])
def test_a_sound_token_names_its_caller(tmp_path: Path, clock: FakeClock, algorithm: str) -> None:
    issuer = Issuer(tmp_path / "keys.json", clock, algorithm)
    tokens = verifier(issuer, clock)
    caller = tokens.caller(issuer.token("shop"))
    assert (caller.path, caller.client, caller.proof) == ("client/shop", "shop", "token")
    assert tokens.caller(issuer.token("spiffe://loanmesh/operator/ann")).path == "operator/ann"


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"aud": "another"}, "TOKEN_AUDIENCE"),
        ({"iss": "https://elsewhere.example"}, "TOKEN_ISSUER"),
        ({"exp": None}, "TOKEN_INVALID"),
        ({"sub": None}, "TOKEN_INVALID"),
        ({"aud": None}, "TOKEN_INVALID"),
        ({"iss": None}, "TOKEN_INVALID"),
        ({"sub": "ns/loanmesh/sa/intake"}, "TOKEN_SUBJECT"),
        ({"sub": "spiffe://loanmesh/ns/loanmesh/sa/intake"}, "TOKEN_SUBJECT"),
        ({"sub": "spiffe://elsewhere/client/shop"}, "TOKEN_SUBJECT"),
        ({"sub": "client/a/b"}, "TOKEN_SUBJECT"),
        ({"sub": ""}, "TOKEN_SUBJECT"),
        ({"sub": "shop\nlevel=error"}, "TOKEN_SUBJECT"),
        ({"sub": "shop\x00"}, "TOKEN_SUBJECT"),
        ({"sub": "操作员"}, "TOKEN_SUBJECT"),
        ({"sub": "s" * 65}, "TOKEN_SUBJECT"),
        ({"exp": "soon"}, "TOKEN_INVALID"),
        ({"exp": float("nan")}, "TOKEN_INVALID"),
        ({"exp": float("inf")}, "TOKEN_INVALID"),
        ({"exp": 10**400}, "TOKEN_INVALID"),
    ],
)
def test_whatever_is_wrong_with_a_claim_is_said(
    issuer: Issuer, clock: FakeClock, claims: dict[str, Any], expected: str
) -> None:
    assert reason(verifier(issuer, clock), issuer.token(**{"subject": "shop", **claims})) == expected


def test_an_expired_token_is_refused_also_after_it_was_believed(issuer: Issuer, clock: FakeClock) -> None:
    tokens = verifier(issuer, clock)
    token = issuer.token(life_s=60.0)
    tokens.caller(token)
    clock.advance(60.0 + LEEWAY_S + 1)
    assert reason(tokens, token) == "TOKEN_EXPIRED"
    assert reason(verifier(issuer, clock), token) == "TOKEN_EXPIRED"
    early = issuer.token(nbf=int(clock.now().timestamp()) + 3600, life_s=7200)
    assert reason(tokens, early) == "TOKEN_NOT_YET_VALID"


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_an_algorithm_of_the_tokens_own_choice_is_refused(issuer: Issuer, clock: FakeClock) -> None:
    tokens = verifier(issuer, clock)
    claims = jwt.decode(issuer.token("shop"), options={"verify_signature": False})
    unsigned = f"{_part({'alg': 'none', 'kid': 'first'})}.{_part(claims)}."
    assert reason(tokens, unsigned) == "TOKEN_INVALID"
    # The public key as if it were a shared secret: the oldest trick.
    public = json.dumps(issuer.public("first")).encode()
    signed = f"{_part({'alg': 'HS256', 'kid': 'first'})}.{_part(claims)}"
    shared = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), "sha256")).rstrip(b"=").decode()
    assert reason(tokens, f"{signed}.{shared}") == "TOKEN_INVALID"


def test_a_changed_token_is_refused(issuer: Issuer, clock: FakeClock) -> None:
    tokens = verifier(issuer, clock)
    head, _, signature = issuer.token("shop").split(".")
    claims = jwt.decode(issuer.token("shop"), options={"verify_signature": False})
    assert reason(tokens, f"{head}.{_part({**claims, 'sub': 'operator/root'})}.{signature}") == "TOKEN_INVALID"
    for nonsense in ("", "x", "a.b.c", "é.é.é", "." * 5, "A" * 9000):
        assert reason(tokens, nonsense) in ("TOKEN_INVALID", "TOKEN_KEY")


def test_keys_rotate_without_a_refused_token_and_a_dropped_key_is_believed_no_longer(
    issuer: Issuer, clock: FakeClock
) -> None:
    tokens = verifier(issuer, clock)
    old = issuer.token("shop")
    tokens.caller(old)
    issuer.new_key("second")
    # Used before anybody looked at the file: an unknown key makes us look.
    assert tokens.caller(issuer.token("shop")).path == "client/shop"
    assert tokens.caller(old).path == "client/shop"
    issuer.drop_key("first")
    tokens.look()
    assert reason(tokens, old) == "TOKEN_KEY"


def test_a_key_that_was_never_published_is_not_looked_for_all_the_time(issuer: Issuer, clock: FakeClock) -> None:
    tokens = verifier(issuer, clock)
    issuer.new_key("secret", publish=False)
    assert reason(tokens, issuer.token("shop")) == "TOKEN_KEY"
    issuer.publish()
    assert reason(tokens, issuer.token("shop")) == "TOKEN_KEY"
    clock.advance(1.0)
    assert tokens.caller(issuer.token("shop")).path == "client/shop"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON Web Key Set"),
        pytest.param("[" * 100_000, "is no JSON Web Key Set", id="deep"),
        ('{"keys": []}', "holds no key"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}', "kty oct is not allowed"),
        ('{"keys": 5}', "is no JSON Web Key Set"),
        ("[]", "is no JSON Web Key Set"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_and_later_ignored(
    issuer: Issuer, clock: FakeClock, content: str, said: str
) -> None:
    tokens = verifier(issuer, clock)
    issuer.file.write_text(content)
    with pytest.raises(BadKeys, match=said):
        verifier(issuer, clock)
    tokens.look()
    assert tokens.caller(issuer.token("shop")).path == "client/shop"


def test_remembered_tokens_are_bounded(issuer: Issuer, clock: FakeClock) -> None:
    tokens = verifier(issuer, clock)
    for number in range(TOKENS_REMEMBERED + 10):
        tokens.caller(issuer.token(f"shop-{number}"))
    assert len(tokens._verified) == TOKENS_REMEMBERED
