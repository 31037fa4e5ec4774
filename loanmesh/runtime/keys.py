"""The keys that personal data is sealed and looked up with: a file of several, re-read when it changes.

A key is in use from its `current_from` on, and can be read for as long as it stands in the file. A new one is dated a
little ahead, so that every replica has read it before the first of them writes with it. Key material is never shown.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.lasting import Lasting
from loanmesh.runtime.setting_rules import WrongSetting

SECRET_BYTES = 32
"""256 bits: AES-256, and HMAC-SHA256 with a key as long as its hash."""
PURPOSES = ("seal", "look_up")
"""seal: encrypts the data keys. look_up: hashes subjects, so that they are found and never read."""
LOOK_EVERY_S = 5.0
"""How often the file is looked at; a look costs one stat."""
AHEAD_S = 180.0
"""How far ahead a new key is dated: a cluster takes up to two minutes to hand a changed Secret to every pod."""
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
log = structlog.get_logger()


class WrongKeys(ValueError):
    """A keys file cannot be used; the text says why, and shows nothing of any key."""


@dataclass(frozen=True)
class Key:
    """One key. Its secret is in no text made from it."""

    id: str
    current_from: dt.datetime
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class KeySet:
    """The keys of one purpose, oldest first."""

    keys: tuple[Key, ...]

    def current(self, now: dt.datetime) -> Key:
        """The newest one in use; the oldest while none is, so that a clock which runs behind stops nothing."""
        return next((key for key in reversed(self.keys) if key.current_from <= now), self.keys[0])

    def get(self, key_id: str) -> Key | None:
        """The key of this id."""
        return next((key for key in self.keys if key.id == key_id), None)


@dataclass(frozen=True)
class KeyRing:
    """All keys of a service."""

    seal: KeySet
    look_up: KeySet


def new_key(purpose: str, current_from: dt.datetime, random_bytes: Callable[[int], bytes] = os.urandom) -> Key:
    """A fresh key whose id tells purpose and day."""
    return Key(
        f"{purpose.replace('_', '-')}-{current_from:%Y%m%d}-{random_bytes(3).hex()}",
        current_from,
        random_bytes(SECRET_BYTES),
    )


def new_ring(now: dt.datetime, random_bytes: Callable[[int], bytes] = os.urandom) -> KeyRing:
    """One fresh key a purpose, in use at once."""
    seal, look_up = (KeySet((new_key(purpose, now, random_bytes),)) for purpose in PURPOSES)
    return KeyRing(seal, look_up)


def read_ring(path: Path) -> KeyRing:
    """The keys in a file. Raises WrongKeys."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise WrongKeys(f"{path} does not exist; make it with: loanmesh keys new {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise WrongKeys(f"{path} cannot be read: {type(error).__name__}") from error
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        # Without the parser's own words and without the cause: both quote the text, which may be a key.
        raise WrongKeys(f"{path} is no JSON") from None
    if not isinstance(said, dict) or set(said) != set(PURPOSES):
        raise WrongKeys(f"{path} must be a JSON object with exactly {' and '.join(PURPOSES)}")
    seal, look_up = (_key_set(path, purpose, said[purpose]) for purpose in PURPOSES)
    return KeyRing(seal, look_up)


def write_ring(path: Path, ring: KeyRing, *, new: bool = False) -> None:
    """Write the file, for its owner alone (0600), whole or not at all. Raises FileExistsError where it must be new."""
    if new and path.exists():
        raise FileExistsError(f"{path} is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump({purpose: [_plain(key) for key in getattr(ring, purpose).keys] for purpose in PURPOSES}, file)
        file.flush()
        os.fsync(file.fileno())
    if new:
        # Two who begin at once: the second must find the keys of the first, which may be in use already.
        try:
            os.link(aside, path)
        finally:
            aside.unlink()
    else:
        aside.replace(path)


def _plain(key: Key) -> dict[str, str]:
    at = key.current_from.isoformat().replace("+00:00", "Z")
    return {"id": key.id, "current_from": at, "secret": base64.b64encode(key.secret).decode()}


def _key_set(path: Path, purpose: str, said: Any) -> KeySet:
    if not isinstance(said, list) or not said:
        raise WrongKeys(f"{path}: {purpose} must be a list of at least one key")
    keys = [_key(f"{path}: {purpose}[{index}]", one) for index, one in enumerate(said)]
    if len({key.id for key in keys}) != len(keys):
        raise WrongKeys(f"{path}: {purpose} has two keys of one id")
    return KeySet(tuple(sorted(keys, key=lambda key: (key.current_from, key.id))))


def _key(where: str, said: Any) -> Key:
    if not isinstance(said, Mapping) or set(said) != {"id", "current_from", "secret"}:
        raise WrongKeys(f"{where} must have exactly id, current_from and secret")
    if not isinstance(said["id"], str) or not _ID.fullmatch(said["id"]):
        raise WrongKeys(f"{where}.id must be up to 40 small letters, digits and hyphens")
    try:
        at = dt.datetime.fromisoformat(said["current_from"])
        if at.tzinfo is None:
            raise ValueError
    except (TypeError, ValueError):
        raise WrongKeys(f"{where}.current_from must be a time with its zone, as 2026-11-25T00:00:00Z") from None
    try:
        secret = base64.b64decode(said["secret"], validate=True)
    except (TypeError, ValueError):
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise WrongKeys(f"{where}.secret must be {SECRET_BYTES} bytes in base64")
    return Key(said["id"], at, secret)


class Keys:
    """The keys in force, from a file that may change under it."""

    def __init__(self, ring: KeyRing, clock: Clock, path: Path | None = None) -> None:
        self._ring = ring
        self._clock = clock
        self._path = path
        self._seen = _stamp(path)
        self.generation = 0
        """Counts up when the keys are others than before."""

    @classmethod
    def open(cls, setting: str, path: Path, clock: Clock) -> Keys:
        """Read the file that a setting names. Raises WrongSetting."""
        try:
            return cls(read_ring(path), clock, path)
        except WrongKeys as error:
            raise WrongSetting(setting, str(error)) from error

    @property
    def ring(self) -> KeyRing:
        """As last read."""
        return self._ring

    def now(self) -> dt.datetime:
        """The time by which keys are current."""
        return self._clock.now()

    def seal(self) -> Key:
        """The key to seal with now."""
        return self._ring.seal.current(self._clock.now())

    def look_up(self) -> Key:
        """The key to hash subjects with now."""
        return self._ring.look_up.current(self._clock.now())

    def look_ups(self) -> Sequence[Key]:
        """All that subjects may be hashed with, newest first."""
        return tuple(reversed(self._ring.look_up.keys))

    def sealed_with(self, key_id: str) -> Key:
        """A key by its id, looked for in the file where it is not known yet.

        Raises DependencyDown: a key that is not here now may come, and until then the work waits.
        """
        if (found := self._ring.seal.get(key_id)) is None:
            self.look()
            found = self._ring.seal.get(key_id)
        return found or _absent("seal", key_id)

    def looked_up_with(self, key_id: str) -> Key:
        """As `sealed_with`, for hashes."""
        if (found := self._ring.look_up.get(key_id)) is None:
            self.look()
            found = self._ring.look_up.get(key_id)
        return found or _absent("look_up", key_id)

    def look(self) -> None:
        """Read the file again where it changed. One that cannot be used is reported once, and the keys stay."""
        if self._path is None or (stamp := _stamp(self._path)) == self._seen:
            return
        self._seen = stamp
        try:
            ring = read_ring(self._path)
        except WrongKeys as error:
            log.error("keys_unusable", error=str(error), what="the keys read before stay in force")
            return
        if ring != self._ring:
            self._ring = ring
            self.generation += 1
            log.info(
                "keys_read", seal=[key.id for key in ring.seal.keys], look_up=[key.id for key in ring.look_up.keys]
            )

    async def look_forever(self) -> None:
        """Look at the file again and again, until cancelled."""
        lasting = Lasting("keys_file")
        while True:
            await self._clock.sleep(LOOK_EVERY_S)
            with lasting:
                self.look()


def _absent(purpose: str, key_id: str) -> Key:
    raise DependencyDown(f"the {purpose} key {key_id} is not in this replica's keys file; put it back, or hand it on")


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What changes with the file, through the links a cluster mounts a Secret with; None where it is away."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None
