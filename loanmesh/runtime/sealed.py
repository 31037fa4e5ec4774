"""Personal data at rest: sealed with AES-256-GCM, each blob bound to its place; subjects found by keyed hash.

A *data key* seals what belongs together (an application), and is itself kept wrapped by a key of the ring, its id
beside it. Destroying the wrapped data key destroys the content, in every copy of the database that the ring's key is
kept away from. Rotation wraps the data key anew and leaves the content alone.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable
from functools import lru_cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from loanmesh.runtime.keys import SECRET_BYTES, Keys

MARK = b"\x00\x01"
"""Begins each sealed blob: form 1. No protobuf message and no JSON text begins with a zero byte."""
NONCE_BYTES = 12
"""Random. A data key seals a handful of blobs; a ring's key wraps one data key an application, and is to be rotated
before 2**32 of them (NIST SP 800-38D, 8.3): at fifty applications a second, once in two and a half years."""


class Unsealable(Exception):
    """A blob is not what was sealed for its place: changed, swapped, or of another key. Says nothing of the content."""


class DataKey:
    """Seals blobs that belong together. `wrapped` and `key_id` are what is stored of it."""

    __slots__ = ("_cipher", "_random", "key_id", "wrapped")

    def __init__(self, secret: bytes, key_id: str, wrapped: bytes, random_bytes: Callable[[int], bytes]) -> None:
        self._cipher = AESGCM(secret)
        self._random = random_bytes
        self.key_id = key_id
        self.wrapped = wrapped

    def seal(self, plain: bytes, place: str) -> bytes:
        """Encrypt for one place, e.g. `lenders/demo/applications/0192.../payload`; only there is it read again."""
        nonce = self._random(NONCE_BYTES)
        return MARK + nonce + self._cipher.encrypt(nonce, plain, place.encode())

    def unseal(self, blob: bytes, place: str) -> bytes:
        """The plain bytes. Raises Unsealable."""
        try:
            return self._cipher.decrypt(blob[2 : 2 + NONCE_BYTES], blob[2 + NONCE_BYTES :], place.encode())
        except (InvalidTag, ValueError):
            raise Unsealable(f"what is stored at {place} was not sealed for it") from None


def is_sealed(blob: bytes) -> bool:
    """Whether a blob is sealed; those of before sealing are not."""
    return blob[:2] == MARK


class Sealer:
    """Makes and opens data keys, and hashes subjects, with the keys in force."""

    def __init__(self, keys: Keys, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self.keys = keys
        self._random = random_bytes

    def new_key(self, place: str) -> DataKey:
        """A fresh data key for what belongs to `place`."""
        secret = self._random(SECRET_BYTES)
        return self._wrap(secret, place)

    def open_key(self, key_id: str, wrapped: bytes, place: str) -> DataKey:
        """A stored data key. Raises DependencyDown while its ring's key is not here, Unsealable."""
        return DataKey(self._unwrap(key_id, wrapped, place), key_id, wrapped, self._random)

    def rewrap(self, key_id: str, wrapped: bytes, place: str) -> DataKey:
        """The same data key under the ring's current key."""
        return self._wrap(self._unwrap(key_id, wrapped, place), place)

    def row_key(self, place: str) -> DataKey:
        """A key derived for `place`, not stored: for rows that are short-lived and deleted whole."""
        key = self.keys.seal()
        return DataKey(_derived(key.secret, place), key.id, b"", self._random)

    def open_row_key(self, key_id: str, place: str) -> DataKey:
        """As `row_key`, under the key it was derived from. Raises DependencyDown while that is not here."""
        return DataKey(_derived(self.keys.sealed_with(key_id).secret, place), key_id, b"", self._random)

    def subject(self, lender: str, number: str) -> str:
        """The keyed hash under which a subject is found at one lender, hexadecimal; those of two lenders differ."""
        return _hash(self.keys.look_up().secret, f"subject|{lender}|{number}".encode())

    def subjects(self, lender: str, number: str) -> list[str]:
        """All hashes under which a subject may be found, since keys are rotated; newest first."""
        said = f"subject|{lender}|{number}".encode()
        return [_hash(key.secret, said) for key in self.keys.look_ups()]

    def fingerprint(self, said: bytes) -> str:
        """`{key id}:{hash}`, to tell later whether the same is said again; nothing can be guessed from it."""
        key = self.keys.look_up()
        return f"{key.id}:{_hash(key.secret, said)}"

    def is_print_of(self, fingerprint: str, said: bytes) -> bool:
        """Whether a fingerprint, of this or an earlier key, is that of `said`.

        Raises DependencyDown while its key is not here.
        """
        key_id, _, hash_ = fingerprint.partition(":")
        return hmac.compare_digest(hash_, _hash(self.keys.looked_up_with(key_id).secret, said))

    def _wrap(self, secret: bytes, place: str) -> DataKey:
        key = self.keys.seal()
        nonce = self._random(NONCE_BYTES)
        wrapped = nonce + _cipher(key.secret).encrypt(nonce, secret, place.encode())
        return DataKey(secret, key.id, wrapped, self._random)

    def _unwrap(self, key_id: str, wrapped: bytes, place: str) -> bytes:
        cipher = _cipher(self.keys.sealed_with(key_id).secret)
        try:
            return cipher.decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], place.encode())
        except (InvalidTag, ValueError):
            raise Unsealable(f"the data key of {place} was not wrapped for it by key {key_id}") from None


@lru_cache(maxsize=16)
def _cipher(secret: bytes) -> AESGCM:
    return AESGCM(secret)


def _derived(secret: bytes, place: str) -> bytes:
    return hmac.digest(secret, b"row|" + place.encode(), "sha256")


def _hash(secret: bytes, said: bytes) -> str:
    return hmac.digest(secret, said, "sha256").hex()
