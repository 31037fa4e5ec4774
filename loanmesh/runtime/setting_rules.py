"""What a setting may be, beyond its type, and how a wrong one ends the start."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, GetCoreSchemaHandler, SecretStr
from pydantic_core import CoreSchema, core_schema


class WrongSetting(Exception):
    """A setting does not let the process start: its name, why, and what is allowed instead."""

    exit_code = 2

    def __init__(self, name: str, why: str, allowed: str = "") -> None:
        super().__init__(f"{name}: {why}" + (f"; allowed: {allowed}" if allowed else ""))


class NotReachable(WrongSetting):
    """What a setting names does not answer now; the same start may succeed later."""

    exit_code = 1


def refuse(*problems: WrongSetting) -> NoReturn:
    """End the process, with one line a problem on stderr."""
    sys.stderr.write("".join(f"settings: {problem}\n" for problem in problems))
    raise SystemExit(max(problem.exit_code for problem in problems))


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Around a start: a wrong setting ends it, in one line."""
    try:
        yield
    except WrongSetting as error:
        refuse(error)


@dataclass(frozen=True)
class Must:
    """A rule to stand in a setting's `Annotated`: `allowed` says it in words, `holds` tells whether it is kept."""

    allowed: str
    holds: Callable[[str], object]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str | SecretStr) -> str | SecretStr:
        if not self.holds(value.get_secret_value() if isinstance(value, SecretStr) else value):
            raise ValueError(f"must be {self.allowed}")
        return value


def one_of(known: Sequence[str]) -> Must:
    """One of these words."""
    return Must(f"one of {', '.join(known)}", lambda value: value in known)


_HOST_PORT = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_GRPC_NAME = re.compile(r"(dns:|ipv4:|ipv6:|unix:|unix-abstract:).*[^/:]")


def is_host_port(value: str, least: int = 1) -> bool:
    """Whether it is HOST:PORT with a port from `least`."""
    found = _HOST_PORT.fullmatch(value)
    return found is not None and least <= int(found[2]) <= 65535


def _is_target(value: str) -> bool:
    if _GRPC_NAME.fullmatch(value):
        return True
    parts = value.split(",")
    # Several addresses go to gRPC as `ipv4:`, which takes no names.
    return all(is_host_port(part) for part in parts) and (len(parts) == 1 or all(part[0].isdigit() for part in parts))


def is_loopback(value: str) -> bool:
    """Whether HOST:PORT is reached from this machine only."""
    host = value.rsplit(":", 1)[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def stays_here(target: str) -> bool:
    """Whether a target, of any kind that gRPC takes, leads to this machine only: loopback addresses, a socket of the
    file system, or names that a name server on loopback answers for."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    if target.startswith("dns://"):
        return is_loopback(target.removeprefix("dns://").split("/", 1)[0])
    target = re.sub(r"^(ipv4|ipv6|dns):/*", "", target)
    return all(is_loopback(part) for part in target.split(","))


def is_http(value: str) -> bool:
    """Whether it is an http:// or https:// address."""
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_database(value: str) -> bool:
    if value.startswith("sqlite:///"):
        path = value.removeprefix("sqlite:///")
        return bool(path) and ":memory:" not in path and "?" not in path
    try:
        parts = urlsplit(value)
        return parts.scheme in ("postgresql", "postgres") and len(parts.path) > 1 and parts.port != 0
    except ValueError:
        return False


def _one_scheme(url: SecretStr) -> SecretStr:
    value = url.get_secret_value()
    return SecretStr("postgresql" + value.removeprefix("postgres")) if value.startswith("postgres://") else url


Listen = Annotated[str, Must("HOST:PORT, with a port from 0 (any free one) to 65535", lambda v: is_host_port(v, 0))]
ExtraListen = Annotated[
    str, Must("HOST:PORT, with a port from 0 (any free one) to 65535, or empty", lambda v: not v or is_host_port(v, 0))
]
Target = Annotated[
    str, Must("HOST:PORT, several IP addresses with commas, or a gRPC name such as dns:///bureau:7402", _is_target)
]
TrustDomain = Annotated[
    str, Must("a name such as loanmesh or lender.example", re.compile(r"[a-z0-9._-]{1,255}").fullmatch)
]
HttpUrl = Annotated[str, Must("an address such as http://127.0.0.1:7405", is_http)]
DatabaseUrl = Annotated[
    SecretStr,
    Must("sqlite:///PATH (sqlite:////PATH from the root) or postgresql://USER:PASSWORD@HOST/NAME", _is_database),
    AfterValidator(_one_scheme),
]
