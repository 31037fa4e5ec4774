"""Who calls: proven by a certificate or a token, else the caller's own word."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

NAME_CHARS_MAX = 64
"""Of a client's or operator's name: it is stored with each application, and part of an index."""
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")
"""What SPIFFE allows in a word of a path; no word of others can write into a log or a table anything but a name."""
CALLERS_REMEMBERED = 4096
"""Identities whose reading is kept; a mesh has fewer."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever makes a call.

    path    what follows the trust domain in a SPIFFE ID: `client/NAME`, `operator/NAME`, `ns/NAMESPACE/sa/NAME`; empty
            for a stranger.
    proof   by what it is proven.
    """

    path: str
    proof: Literal["certificate", "token", "none"]

    @property
    def client(self) -> str:
        """By what a client's quota and request ids count: its bare name; the whole path for others, so that none of
        them can be mistaken for a client."""
        kind, _, name = self.path.partition("/")
        return name if kind == "client" else self.path


STRANGER = Caller("", "none")
_current: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("caller", default=None)
_said: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("said", default=MappingProxyType({}))


def note(caller: Caller | None) -> None:
    """From now on, in this task, `caller` is who calls; None: nobody proved anything."""
    _current.set(caller)


def note_said(metadata: Mapping[str, str]) -> None:
    """From now on, in this task, this is what the call's text metadata says: read once, since it is copied each time
    that gRPC is asked for it."""
    _said.set(metadata)


def said() -> Mapping[str, str]:
    """Text metadata of the call that this task answers; not proven."""
    return _said.get()


def proven() -> Caller | None:
    """Who makes the call that this task answers, where that is proven."""
    return _current.get()


def proven_path() -> str:
    """The path of who makes the call where that is proven, else empty: for records, beside whom the call names."""
    who = proven()
    return who.path if who else ""


def of_certificate(facts: Mapping[str, Iterable[bytes]], trust_domain: str) -> Caller | None:
    """Whose certificate a connection was made with; None where none was shown, or one that names nobody of ours.

    facts  gRPC's auth_context; what it holds is verified.
    """
    identities = tuple(facts.get("peer_spiffe_id", ()))
    return _read(identities[0], trust_domain) if len(identities) == 1 else None


@lru_cache(CALLERS_REMEMBERED)
def _read(identity: bytes, trust_domain: str) -> Caller | None:
    start = f"spiffe://{trust_domain}/"
    text = identity.decode("ascii", "replace")
    path = text.removeprefix(start)
    return Caller(path, "certificate") if text.startswith(start) and is_path(path) else None


def is_path(path: str) -> bool:
    """Whether it is one of the three that we give out."""
    match path.split("/"):
        case ["client" | "operator", name]:
            return bool(_NAME.fullmatch(name)) and len(name) <= NAME_CHARS_MAX
        case ["ns", namespace, "sa", name]:
            return bool(_NAME.fullmatch(namespace)) and bool(_NAME.fullmatch(name))
    return False
