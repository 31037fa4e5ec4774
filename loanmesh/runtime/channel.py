"""Channels between services, and the client side's interceptor.

Health-checked round robin under outlier detection; retries by gRPC itself on UNAVAILABLE only, throttled. These are
the only retries of a hop: nothing above may retry the same call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2  # noqa: F401  Registers the health service that healthCheckConfig calls.

from loanmesh.runtime import deadline, measures, semconv, telemetry, tracing
from loanmesh.runtime.certificates import Files, Watched
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.handshake import Diagnosis
from loanmesh.runtime.rotation import RotatingChannel, named
from loanmesh.runtime.setting_rules import WrongSetting, stays_here
from loanmesh.runtime.settings import TlsSettings
from loanmesh.runtime.tls import files_of

# Calls here are batches, so few: intake has a handful under way, and a replica that hangs swallows them all at once.
# Two failures within a second must do, or it would never be ejected (measured: with a volume of 10 it was not in 20 s).
_EJECTION_VOLUME = 2
# Stops retries after half as many failed attempts. 100 let 1.13 attempts a call through while everything failed.
_RETRY_TOKENS = 20
SERVICE_CONFIG = {
    "loadBalancingConfig": [
        {
            # Under this name only: plain `outlier_detection` makes every call fail.
            "outlier_detection_experimental": {
                "interval": "1s",
                "baseEjectionTime": "5s",
                "maxEjectionPercent": 34,
                "failurePercentageEjection": {"threshold": 50, "minimumHosts": 2, "requestVolume": _EJECTION_VOLUME},
                "childPolicy": [{"round_robin": {}}],
            }
        }
    ],
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    "retryThrottling": {"maxTokens": _RETRY_TOKENS, "tokenRatio": 0.1},
}


def open_channel(
    target: str, clock: Clock, deadline_s: Callable[[str], float], *, service: str, tls: TlsSettings
) -> grpc.aio.Channel:
    """A channel to `target`: `host:port[,host:port...]` or any gRPC name such as `dns:///bureau:7402`.

    deadline_s  longest time a call of the given method may take; a caller's own deadline shortens it.
    service     whose certificate must be shown there.
    Raises WrongSetting for plaintext to anywhere but this machine.
    """
    if tls.mode == "plaintext" and not stays_here(target):
        raise WrongSetting(
            f"the address of {service}",
            f"{target}: plaintext is for loopback only",
            "TLS__MODE=mtls, for others",
        )
    files = files_of(tls) if tls.mode == "mtls" else None
    return make_channel(
        target,
        service,
        files,
        clock,
        options=channel_options(SERVICE_CONFIG),
        interceptors=_interceptors(clock, deadline_s, Diagnosis(service, files, clock)),
        reload_s=tls.reload_s,
    )


def make_channel(
    target: str,
    service: str,
    files: Files | None,
    clock: Clock,
    *,
    options: Sequence[tuple[str, Any]],
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    reload_s: float = 10.0,
) -> grpc.aio.Channel:
    """Over TLS with what `files` hold, now and later; without them in plaintext. Raises BadCertificate."""
    address = target_of(target)
    if files is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    options = [*options, *named(service)]

    def connect(credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)

    return RotatingChannel(Watched(files), connect, reload_s, clock)


def target_of(address: str) -> str:
    """What gRPC calls an address: `host:port`, several `ip:port` with commas, or any gRPC name, which is kept."""
    if "://" in address or address.startswith(("unix:", "ipv4:", "ipv6:", "dns:")):
        return address
    if address.startswith("["):
        return f"ipv6:{address}"
    if address[:1].isdigit():
        return f"ipv4:{address}"
    if "," in address:
        raise ValueError(f"several addresses must be IP addresses, or one name that has them all, not {address!r}")
    return f"dns:///{address}"


def channel_options(config: Mapping[str, object]) -> list[tuple[str, str | int]]:
    """What all channels have in common, with the given service config."""
    return [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.dns_min_time_between_resolutions_ms", 2000),
        ("grpc.max_receive_message_length", 32 * 1024 * 1024),
        # Channels of one process that share a connection share its health watch, too; now and then one of them finds it
        # half made, and the process ends with a segmentation fault (grpcio 1.85, HealthProducer).
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]


def _interceptors(
    clock: Clock, deadline_s: Callable[[str], float], diagnosis: Diagnosis | None = None
) -> Sequence[grpc.aio.ClientInterceptor]:
    return [_UnaryInterceptor(clock, deadline_s, diagnosis)]


class _UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    """Deadline, trace and metrics around every unary call."""

    def __init__(self, clock: Clock, deadline_s: Callable[[str], float], diagnosis: Diagnosis | None) -> None:
        self._clock = clock
        self._deadline_s = deadline_s
        self._diagnosis = diagnosis
        self._duration = telemetry.recorder(measures.CLIENT_CALL)

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        """Make the call within what time is left; a cancelled caller cancels the call."""
        method = details.method if isinstance(details.method, str) else details.method.decode()
        method = method.lstrip("/")
        started = self._clock.monotonic()
        status, cause = "OK", ""
        within, recorder = tracing.current(), tracing.recorder()
        surrounding = within.traceparent if within else ""
        span = recorder.begin(surrounding) if recorder else None
        told = span.traceparent if span else surrounding
        timeout = deadline.remaining_s(started, details.timeout or self._deadline_s(method))
        metadata = [*(details.metadata or ()), *([("traceparent", told)] if told else [])]
        call = await continuation(
            grpc.aio.ClientCallDetails(
                details.method, timeout, grpc.aio.Metadata(*metadata), details.credentials, details.wait_for_ready
            ),
            request,
        )
        try:
            # Awaiting the call itself, never its code: only so does a cancelled caller cancel the server.
            return await call
        except grpc.RpcError as error:
            if isinstance(error, grpc.aio.AioRpcError):
                status = error.code().name
                if cause := self._cause(error):
                    error.add_note(cause)
            else:
                status = "UNKNOWN"
            raise
        except BaseException:
            status = "CANCELLED"
            call.cancel()
            raise
        finally:
            ended = self._clock.monotonic()
            wrong = "" if status == "OK" else status
            if recorder and span and (span.kept or wrong):
                said = {semconv.ERROR_TYPE: cause} if cause else {}
                recorder.tell_call(
                    tracing.Call(method, "client", span.at, span.parent, started, ended, status, said, wrong)
                )
            self._duration(ended - started, {semconv.RPC_METHOD: method, semconv.RPC_STATUS_CODE: status})

    def _cause(self, error: grpc.aio.AioRpcError) -> str:
        """Tell a bad certificate from a service that is away, in span and log."""
        if self._diagnosis is None or error.code() is not grpc.StatusCode.UNAVAILABLE:
            return ""
        return self._diagnosis.note(error.details() or "")
