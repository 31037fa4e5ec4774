"""What happened between two looks at a mesh: rates, errors, latencies. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lending.ops.v1 import ops_service_pb2 as pb

FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that are the mesh's fault, as for spans."""
SHED = "RESOURCE_EXHAUSTED"
WAITING = ("/WatchApplication", "/GetStatus", "/ListDependencies")
"""Calls that last as long as their caller likes, and our own looks: they say nothing of how quick a service is."""


@dataclass(frozen=True)
class Look:
    """One process, as it was seen at a time (monotonic seconds); None: it did not answer."""

    at: float
    status: pb.GetStatusResponse | None
    dependencies: Sequence[pb.Dependency] = ()


@dataclass(frozen=True)
class Row:
    """One replica between two looks. Rates are a second, latencies milliseconds; None where nothing was measured."""

    address: str
    service: str
    instance: str
    state: str
    """up, draining, away, or new: started since the last look."""
    calls: float
    errors: float
    shed: float
    p50_ms: float | None
    p95_ms: float | None
    loop_lag_ms: float
    queued: int
    """Entries in its queues."""
    accepted: float
    decided: float


@dataclass(frozen=True)
class Picture:
    """A mesh between two looks."""

    rows: Sequence[Row]
    accepted: float
    decided: float
    backlog: int | None
    """Applications that could be worked on now; None where no process of intake tells."""
    resting: Sequence[dict[str, str | int | float]]
    """Applications that are tried again later: waiting_for, applications, retry_at (seconds since 1970)."""
    open: Sequence[dict[str, str]]
    """Breakers that are not closed: dependency, state, cause, and whose they are."""
    steps: Sequence[dict[str, str]]
    """Degradation steps in force: step, subject, cause, and whose they are."""


def picture(before: Mapping[str, Look], after: Mapping[str, Look]) -> Picture:
    """What the second look says beside the first, by address."""
    rows = [_row(address, before.get(address), look) for address, look in after.items()]
    statuses = [look.status for look in after.values() if look.status]
    backlogs = [status.backlog for status in statuses if status.HasField("backlog")]
    return Picture(
        rows=rows,
        accepted=sum(row.accepted for row in rows),
        decided=sum(row.decided for row in rows),
        backlog=max(backlogs) if backlogs else None,  # All replicas count the same store.
        resting=max((_resting(status) for status in statuses), key=len, default=[]),
        open=[
            shut for look in after.values() if look.status for shut in _open(look.status.instance, look.dependencies)
        ],
        steps=[
            {"step": step.step, "subject": step.subject, "cause": step.cause, "at": status.instance}
            for status in statuses
            for step in status.degradations
        ],
    )


def quantile_ms(counts: Sequence[int], bounds_s: Sequence[float], share: float) -> float | None:
    """The value below which `share` of what was counted lies, within its bucket by proportion; None for none."""
    total = sum(counts)
    if total == 0:
        return None
    wanted, seen = share * total, 0
    for index, count in enumerate(counts):
        if count and seen + count >= wanted:
            low = bounds_s[index - 1] if index else 0.0
            high = bounds_s[index] if index < len(bounds_s) else bounds_s[-1]
            return 1000 * (low + (high - low) * (wanted - seen) / count)
        seen += count
    return 1000 * bounds_s[-1]


def _row(address: str, before: Look | None, after: Look) -> Row:
    status = after.status
    if status is None:
        gone = before.status if before and before.status else pb.GetStatusResponse()
        return Row(address, gone.service, gone.instance, "away", 0, 0, 0, None, None, 0, 0, 0, 0)
    old = before.status if before and before.status else None
    # Another process counts from nothing, and so does one that was never looked at: its past is no rate.
    same = old is not None and old.instance == status.instance
    past_s = max(1e-3, after.at - before.at) if before and same else float("inf")
    counted = {(c.method, c.status): c.counts for c in old.calls} if old and same else {}
    rates = {"calls": 0, "errors": 0, "shed": 0}
    buckets = [0] * (len(status.bounds_s) + 1)
    for call in status.calls:
        if call.method.endswith(WAITING):
            continue
        past = counted.get((call.method, call.status), [0] * len(call.counts))
        new = [now - then for now, then in zip(call.counts, past, strict=True)]
        rates["calls"] += sum(new)
        rates["errors"] += sum(new) if call.status in FAULTS else 0
        rates["shed"] += sum(new) if call.status == SHED else 0
        buckets = [a + b for a, b in zip(buckets, new, strict=True)]
    return Row(
        address=address,
        service=status.service,
        instance=status.instance,
        state="draining" if status.draining else "up" if same else "new",
        calls=rates["calls"] / past_s,
        errors=rates["errors"] / past_s,
        shed=rates["shed"] / past_s,
        p50_ms=quantile_ms(buckets, status.bounds_s, 0.5) if same else None,
        p95_ms=quantile_ms(buckets, status.bounds_s, 0.95) if same else None,
        loop_lag_ms=status.loop_lag_max_ms,
        queued=sum(queue.length for queue in status.queues),
        accepted=(status.accepted - old.accepted) / past_s if old and same else 0.0,
        decided=(status.decisions - old.decisions) / past_s if old and same else 0.0,
    )


def _resting(status: pb.GetStatusResponse) -> list[dict[str, str | int | float]]:
    return [
        {
            "waiting_for": rest.waiting_for,
            "applications": rest.applications,
            "retry_at": rest.retry_time.ToNanoseconds() / 1e9,
        }
        for rest in status.resting
    ]


def _open(instance: str, dependencies: Sequence[pb.Dependency]) -> list[dict[str, str]]:
    return [
        {
            "dependency": one.name.removeprefix("dependencies/"),
            "state": pb.BreakerState.Name(one.breaker_state).removeprefix("BREAKER_STATE_").lower(),
            "cause": one.breaker_cause,
            "at": instance,
        }
        for one in dependencies
        if one.breaker_state != pb.BREAKER_STATE_CLOSED
    ]
