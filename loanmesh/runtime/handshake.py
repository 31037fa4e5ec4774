"""Why a connection over TLS does not come about, in words for whoever has to mend it.

gRPC says it in its error's text where our side refuses. Where the other side refuses us, its server sends no alert but
hangs up, and all that gRPC says is that the socket closed: then a handshake of our own, and a look at our own
certificate, find the cause.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import socket
import ssl
from typing import Any

import structlog

from loanmesh.runtime.certificates import BadCertificate, Files, read
from loanmesh.runtime.clock import Clock

PROBE_S = 2.0
"""How long our own handshake may take."""
REMEMBERED_S = 5.0
"""How long its outcome stands for an address."""
SAID_AGAIN_S = 60.0
"""How often one cause is logged while it lasts."""
ADDRESSES_MAX = 256

WORDS = {
    "tls_server_untrusted": "the server's certificate is signed by none of the CAs we believe",
    "tls_server_expired": "the server's certificate has expired",
    "tls_server_name": "the server's certificate is another service's: it does not state the name we expect",
    "tls_server_plaintext": "the server speaks no TLS",
    "tls_required": "the server speaks TLS and we do not",
    "tls_client_required": "the server wants a certificate from us, and we have none to show",
    "tls_client_untrusted": "the server does not believe the CA that signed our certificate",
    "tls_client_expired": "our certificate has expired",
    "tls_client_refused": "the server refuses our certificate",
    "tls_failed": "the TLS handshake failed",
}
"""Every `error_type` about TLS, and what it means."""
_IN_TEXT = (
    ("Hostname Verification Check failed", "tls_server_name"),
    ("WRONG_VERSION_NUMBER", "tls_server_plaintext"),
    ("certificate has expired", "tls_server_expired"),
    ("certificate is not yet valid", "tls_server_expired"),
    ("CERTIFICATE_VERIFY_FAILED", "tls_server_untrusted"),
    ("ls handshake failed", "tls_failed"),
    ("sl handshake failed", "tls_failed"),
)
_ADDRESS = re.compile(r"ipv[46]:(?:%5B)?([0-9a-fA-F.:]+?)(?:%5D)?:([0-9]+): Socket closed")
_UNVERIFIED_EXPIRY, _UNVERIFIED_NAME = (9, 10), (62, 64)
log = structlog.get_logger()


class Diagnosis:
    """Tells what is wrong with TLS towards one service.

    service  the name that its certificate must state; empty: any.
    files  what we show and believe; None where we speak no TLS.
    """

    def __init__(self, service: str, files: Files | None, clock: Clock) -> None:
        self._service = service
        self._files = files
        self._clock = clock
        self._known: dict[tuple[str, int], tuple[float, str]] = {}
        self._said: dict[str, float] = {}
        self._asking: set[asyncio.Task[str]] = set()

    async def cause(self, details: str) -> str:
        """The `error_type` that a failed call's details mean, after asking where they do not say; empty where the
        failure is not about TLS."""
        if found := _in(_IN_TEXT, details):
            return found
        address = _ADDRESS.search(details)
        if not address:
            return ""
        where = (address[1], int(address[2]))
        asked_at, known = self._known.get(where, (float("-inf"), ""))
        if self._clock.monotonic() - asked_at < REMEMBERED_S:
            return known
        found = await asyncio.to_thread(probe, *where, self._service, self._files, self._clock.now())
        self._known[where] = (self._clock.monotonic(), found)
        if len(self._known) > ADDRESSES_MAX:
            self._known.pop(next(iter(self._known)))
        return found

    def note(self, details: str) -> str:
        """The same without waiting: what is known by now. What has to be asked is asked in the background; causes are
        logged, each once a minute."""
        if found := _in(_IN_TEXT, details):
            self._log(found, details)
            return found
        address = _ADDRESS.search(details)
        if not address:
            return ""
        if not self._asking:
            asking = asyncio.create_task(self.cause(details))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            asking.add_done_callback(lambda done: self._log(done.result(), details) if not done.cancelled() else None)
        return self._known.get((address[1], int(address[2])), (0.0, ""))[1]

    def _log(self, cause: str, details: str) -> None:
        now = self._clock.monotonic()
        if not cause or now - self._said.get(cause, float("-inf")) < SAID_AGAIN_S:
            return
        self._said[cause] = now
        log.error("tls_failed", error_type=cause, dependency=self._service, cause=WORDS[cause], details=details[:300])


def probe(host: str, port: int, service: str, files: Files | None, now: dt.datetime) -> str:
    """What is wrong, found by a handshake of our own; empty where nothing is, or nobody answers. Blocks for up to
    PROBE_S seconds a step."""
    try:
        with socket.create_connection((host, port), PROBE_S) as plain:
            if files is None:
                with _believing_all().wrap_socket(plain, server_hostname=service or None):
                    return "tls_required"
            with _showing(files, named=bool(service)).wrap_socket(plain, server_hostname=service or None) as secure:
                # Only what comes after the handshake shows whether the server took our certificate (TLS 1.3): the first
                # frame of HTTP/2, or the end.
                return "" if secure.recv(1) else _refusal(files, now)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _UNVERIFIED_EXPIRY:
            return "tls_server_expired"
        return "tls_server_name" if error.verify_code in _UNVERIFIED_NAME else "tls_server_untrusted"
    except ssl.SSLError as error:
        if files is None:
            return ""
        if "EOF" in (error.reason or ""):
            return _refusal(files, now)
        return "tls_server_plaintext" if error.reason == "WRONG_VERSION_NUMBER" else "tls_failed"
    except OSError:
        return ""


def _refusal(files: Files, now: dt.datetime) -> str:
    """Why a server that we believe hangs up on us."""
    if files.certificate is None:
        return "tls_client_required"
    try:
        material = read(files)
    except BadCertificate:
        return "tls_client_refused"
    if (material.left_s(now) or 0.0) <= 0:
        return "tls_client_expired"
    return "tls_client_refused" if material.is_believed() else "tls_client_untrusted"


def service_at(host: str, port: int, files: Files) -> str:
    """Name of the service that listens there, as its certificate states it, signed by a CA we believe.

    For tools that are pointed at a process, whichever it is. Raises OSError, of which ssl.SSLError is one. Blocks.
    """
    context = _showing(files, named=False)
    with (
        socket.create_connection((host, port), PROBE_S) as plain,
        context.wrap_socket(plain) as secure,
    ):
        shown: dict[str, Any] = secure.getpeercert() or {}
    return next((str(value) for kind, value in shown.get("subjectAltName", ()) if kind == "DNS"), "")


def _showing(files: Files, *, named: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files.ca))
    context.check_hostname = named
    if files.certificate:
        context.load_cert_chain(files.certificate, files.key)
    context.set_alpn_protocols(["h2"])
    return context


def _believing_all() -> ssl.SSLContext:
    """To learn whether TLS is spoken at all; nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _in(table: tuple[tuple[str, str], ...], text: str) -> str:
    return next((cause for sign, cause in table if sign in text), "")
