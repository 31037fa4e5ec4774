"""What can go wrong with a call, by what the caller should do next.

CallFailed      change the request; the same again fails again
Unreachable     send the same again, later, with the same request_id
  Overloaded    the same; `retry_s` says about when
  TlsFailed     the same, once a certificate is put right; `error_type` says which
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class CallFailed(Exception):
    """The mesh refused a call, and would again.

    code        name of the gRPC status, e.g. `INVALID_ARGUMENT`
    reason      stable UPPER_SNAKE word, e.g. `REQUEST_ID_CONFLICT`; empty where none was sent
    violations  (field, rule) pairs of an invalid request
    metadata    what else was said, e.g. `fields` that differ
    """

    def __init__(
        self,
        code: str,
        text: str,
        violations: Sequence[tuple[str, str]] = (),
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.violations = violations
        self.reason = reason
        self.metadata: Mapping[str, str] = metadata or {}


class Unreachable(Exception):
    """The mesh did not answer in time. What was sent may have been stored: send it again with the same `request_id`.

    request_id  of the call, whoever made it; None for calls that change nothing.
    """

    def __init__(self, text: str, request_id: str | None = None) -> None:
        super().__init__(text)
        self.request_id = request_id


class Overloaded(Unreachable):
    """There is more work than fits into the caller's time: in this client, which then sent nothing, or in the mesh.

    retry_s  seconds after which another try has a chance: the expected wait, or what the mesh asked for.
    """

    def __init__(self, text: str, retry_s: float, request_id: str | None = None) -> None:
        super().__init__(text, request_id)
        self.retry_s = retry_s


class TlsFailed(Unreachable):
    """No connection came about, because of a certificate or because only one side speaks TLS. The text says what is
    wrong; somebody has to put it right.

    error_type  stable word, e.g. `tls_server_untrusted`, `tls_client_expired`; as in logs and spans.
    """

    def __init__(self, text: str, error_type: str, request_id: str | None = None) -> None:
        super().__init__(text, request_id)
        self.error_type = error_type
