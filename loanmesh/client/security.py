"""How a client proves who it is, and whom it believes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loanmesh.runtime.certificates import Files
from loanmesh.runtime.token_file import TokenFile

Token = str | Path | Callable[[], str]
"""A token, a file that holds the newest one, or whatever makes one."""


@dataclass(frozen=True)
class Security:
    """TLS towards the mesh. Files are read again when they change, and no call fails for it.

    ca_file         CAs whose certificates are believed, PEM.
    cert_file, key_file   our own certificate and key, PEM; None where a token alone says who we are.
    token           JWT that says who calls, sent with each call: itself, a file, or a function that is asked each time
                    and should keep what it answers until shortly before it expires.
    server_name     name that the server's certificate must state.
    reload_s        how often files are looked at, seconds.
    """

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    token: Token | None = field(default=None, repr=False)
    server_name: str = "intake"
    reload_s: float = 10.0

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together: give both, or neither")

    @classmethod
    def in_folder(cls, folder: Path) -> Security:
        """With the files that `loanmesh certs issue` and cert-manager write: ca.crt, tls.crt, tls.key."""
        return cls(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")

    @property
    def files(self) -> Files:
        """As channels take them."""
        return Files(Path(self.ca_file), self.cert_file, self.key_file)


class Bearer:
    """The token as metadata, always the newest."""

    def __init__(self, token: Token | None) -> None:
        self._newest: Callable[[], str] | None
        match token:
            case Path():
                self._newest = TokenFile(token).token
            case str():
                self._newest = lambda: token
            case _:
                self._newest = token

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """To be sent with a call; empty without a token. Raises OSError where a file cannot be read at all."""
        return (("authorization", f"Bearer {self._newest()}"),) if self._newest else ()
