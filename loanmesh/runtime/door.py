"""The door of a server that speaks TLS: who calls, may they, and what is said of those who may not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from opentelemetry import metrics

from loanmesh.runtime import semconv
from loanmesh.runtime.authorisation import Authorisation
from loanmesh.runtime.caller import STRANGER, Caller, of_certificate
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import LoanmeshError, NotAllowed, Unauthenticated
from loanmesh.runtime.tokens import Tokens

DENIALS = "loanmesh.access.denials"
"""Calls refused at the door, by `reason` and `rpc.method`."""
SAID_AGAIN_S = 60.0
"""How often one kind of denial is logged; what came in between is counted."""
KINDS_MAX = 512
"""Kinds of denial remembered; the oldest is forgotten, and logged again should it come again."""
_BEARER = "bearer "
log = structlog.get_logger()


class Door:
    """Decides before a request is looked at.

    tokens  None: none are taken.
    """

    def __init__(self, authorisation: Authorisation, tokens: Tokens | None, trust_domain: str, clock: Clock) -> None:
        self._authorisation = authorisation
        self._tokens = tokens
        self._trust_domain = trust_domain
        self._clock = clock
        self._said: OrderedDict[tuple[str, str, str], tuple[float, int]] = OrderedDict()
        self._denials = metrics.get_meter("loanmesh").create_counter(
            DENIALS, unit="{call}", description="Calls refused for who made them"
        )

    def enter(self, facts: Mapping[str, Iterable[bytes]], metadata: Mapping[str, str], method: str) -> Caller:
        """Who calls, where they may call this method. Raises Unauthenticated or NotAllowed.

        facts  gRPC's auth_context. A token goes before a certificate: a gateway shows its own, and passes on the word
               of whom it speaks for.
        """
        caller = of_certificate(facts, self._trust_domain) or STRANGER
        try:
            caller = self._bearer(metadata.get("authorization", "")) or caller
            self._authorisation.check_method(caller, method)
        except (Unauthenticated, NotAllowed) as error:
            self._denied(error, caller, method)
            raise
        return caller

    def check_lender(self, caller: Caller, method: str, request: Any) -> None:
        """Raises NotAllowed where the caller may not act for the lender that the request is about."""
        try:
            self._authorisation.check_lender(caller, method, request)
        except NotAllowed as error:
            self._denied(error, caller, method)
            raise

    def _bearer(self, said: str) -> Caller | None:
        if not said or self._tokens is None:
            return None
        if not said.lower().startswith(_BEARER):
            raise Unauthenticated("authorization must be: Bearer TOKEN", reason="TOKEN_INVALID")
        return self._tokens.caller(said[len(_BEARER) :].strip())

    def _denied(self, error: LoanmeshError, caller: Caller, method: str) -> None:
        self._denials.add(1, {"reason": error.reason, semconv.RPC_METHOD: method})
        kind = (caller.path, method, error.reason)
        now = self._clock.monotonic()
        said_at, since = self._said.pop(kind, (float("-inf"), 0))
        if now - said_at < SAID_AGAIN_S:
            self._said[kind] = (said_at, since + 1)
            return
        self._said[kind] = (now, 0)
        if len(self._said) > KINDS_MAX:
            self._said.popitem(last=False)
        log.warning(
            "access_denied",
            caller=caller.path or "stranger",
            proof=caller.proof,
            rpc_method=method,
            error_type=error.reason,
            unsaid_before=since,
        )
