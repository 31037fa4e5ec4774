"""How much of a server one caller may take, as gRPC enforces it before any of our code runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

KIB, MIB = 1024, 1024 * 1024
AGE_GRACE_S = 120.0
"""How long calls under way may go on when their connection is old. Longer than any deadline, so that aging ends no call
but one that nobody reads."""


PROBE_AGE_S = 600.0
"""How long a connection for probes lives; some keep theirs."""


class LimitSettings(BaseModel, frozen=True, extra="forbid"):
    """Bounds on callers who are too big, too many or too slow. A sound client meets none of them."""

    metadata_kib: Annotated[int, Field(ge=1, le=1024)] = 16
    """Metadata of a call, KiB, 32 bytes a header added; beyond, RESOURCE_EXHAUSTED."""
    streams_max: Annotated[int, Field(ge=1, le=100_000)] = 2000
    """Calls under way on one connection; more wait in the client."""
    connections_max: Annotated[int, Field(ge=1, le=100_000)] = 2000
    """Connections open at once; more are closed as they come."""
    handshake_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds within which a connection must have said what it is; who stays silent is cut off."""
    silent_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a word after which the peer of an open connection is asked whether it is there."""
    silent_answer_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds in which it must answer that; else the connection is closed and its calls are cancelled."""


PROBE_LIMITS = {"metadata_kib": 4, "streams_max": 16, "connections_max": 64}
"""Of the port for probes, which asks for no proof: a kubelet opens one connection a probe, for one call."""
PROBE_MESSAGE_BYTES_MAX = 4096


def probe_options(limits: LimitSettings) -> list[tuple[str, int]]:
    """The same for the port that answers probes and nobody else."""
    options = dict(server_options(limits.model_copy(update=PROBE_LIMITS), 1, PROBE_AGE_S))
    return list({**options, "grpc.max_receive_message_length": PROBE_MESSAGE_BYTES_MAX}.items())


def server_options(limits: LimitSettings, max_message_mib: int, max_connection_age_s: float) -> list[tuple[str, int]]:
    """The limits as gRPC's channel arguments.

    Compressed messages are unpacked up to the message limit and no further (tested: a gigabyte of zeros in a megabyte
    of gzip costs the server ten). Calls that never send their message, and streams that nobody reads, end with their
    connection, at its age and its grace.
    """
    return [
        ("grpc.max_receive_message_length", max_message_mib * MIB),
        # Both bounds alike: between them gRPC would refuse by chance.
        ("grpc.max_metadata_size", limits.metadata_kib * KIB),
        ("grpc.absolute_max_metadata_size", limits.metadata_kib * KIB),
        ("grpc.max_concurrent_streams", limits.streams_max),
        ("grpc.max_allowed_incoming_connections", limits.connections_max),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.keepalive_time_ms", int(limits.silent_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(limits.silent_answer_s * 1000)),
        # The one that counts once a ping is on its way; a minute by default.
        ("grpc.http2.ping_timeout_ms", int(limits.silent_answer_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_connection_age_ms", int(max_connection_age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(AGE_GRACE_S * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.so_reuseport", 0),
    ]
