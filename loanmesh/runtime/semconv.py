"""The names that spans, metrics and logs go by, in one place: dashboards, alerts and commands read them here.

RPC names follow the OpenTelemetry conventions that are stable since 1.45 (the Python constants are older); those for
messaging, HTTP and databases are the ones of 1.45 too. What begins with `loanmesh.` is our own. Nothing here may ever
hold personal data: ids of applications stand in spans and logs, never in metrics.
"""

from __future__ import annotations

# --- Attributes of the conventions ---
RPC_SYSTEM_NAME = "rpc.system.name"
RPC_METHOD = "rpc.method"
RPC_STATUS_CODE = "rpc.status_code"
ERROR_TYPE = "error.type"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
MESSAGING_SYSTEM = "messaging.system"
MESSAGING_OPERATION = "messaging.operation.type"
MESSAGING_DESTINATION = "messaging.destination.name"
MESSAGING_BATCH_COUNT = "messaging.batch.message_count"
HTTP_METHOD = "http.request.method"
HTTP_STATUS = "http.response.status_code"
HTTP_RESEND = "http.request.resend_count"
URL_PATH = "url.path"
DB_OPERATION = "db.operation.name"

# --- Our own attributes ---
APPLICATION_ID = "loanmesh.application_id"
"""The application, by the last part of its name. What a trace is looked for by."""
LENDER = "loanmesh.lender"
OWNER = "loanmesh.owner"
"""Which replica held the lease."""
LEASE_END = "loanmesh.lease_end"
"""When a lost lease ended, seconds since 1970 by the database's clock."""
ATTEMPT = "loanmesh.attempt"
"""How often the application has been claimed, this time included."""
OUTCOME = "loanmesh.outcome"
"""Of an attempt: decided's outcome, `deferred`, `awaiting_information`, or `lost`."""
WAITING_FOR = "loanmesh.waiting_for"
WAITED_MS = "loanmesh.waited_ms"
"""How long an application lay in the queue before an attempt began."""
AGE_MS = "loanmesh.age_ms"
"""How old an application was when an attempt ended."""
KEPT_FOR = "loanmesh.kept_for"
"""Why the trace is kept: sampled, deferred, failed, retried, degraded, late,
lost_lease, parked, slow, shed."""
DEGRADATIONS = "loanmesh.degradations"
STAGE = "loanmesh.stage"
"""gather, score, price, conclude or commit."""
DEPENDENCY = "loanmesh.dependency"
SOURCE = "loanmesh.source"
SOURCE_STATE = "loanmesh.source.state"
CAUSE = "loanmesh.cause"
"""In words for a person: what a breaker saw, what a transport said."""
REASON = "loanmesh.reason"
"""UPPER_SNAKE word of a refused call, as in its ErrorInfo."""
RECONSTRUCTED = "loanmesh.reconstructed"
"""The span was told by another process than the one it is of, which is gone or did not keep it."""

# --- Metrics ---
SERVER_DURATION = "rpc.server.call.duration"
CLIENT_DURATION = "rpc.client.call.duration"
LOOP_LAG = "loanmesh.loop.lag"
BREAKER_STATE = "loanmesh.breaker.state"
BREAKER_CHANGES = "loanmesh.breaker.changes"
DEPENDENCY_CALLS = "loanmesh.dependency.calls"
BULKHEAD_IN_USE = "loanmesh.bulkhead.in_use"
BULKHEAD_WAITING = "loanmesh.bulkhead.waiting"
QUEUE_LENGTH = "loanmesh.queue.length"
BACKLOG = "loanmesh.backlog"
DECISIONS = "loanmesh.decisions"
DEGRADED = "loanmesh.degradations"
PARKED = "loanmesh.applications.parked"
DEGRADATION_IN_FORCE = "loanmesh.degradation.in_force"
DURATION_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
