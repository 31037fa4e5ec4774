"""A service's process: start, serve, drain. All four services run through `run`."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from lending.ops.v1.ops_service_pb2_grpc import add_OpsServiceServicer_to_server
from opentelemetry import metrics, propagate, trace

from loanmesh.runtime import deadline, ops, telemetry
from loanmesh.runtime.clock import Clock, SystemClock, new_owner
from loanmesh.runtime.errors import InvalidRequest, LoanmeshError, NotNow
from loanmesh.runtime.loop_lag import Heartbeat
from loanmesh.runtime.profile import profiled
from loanmesh.runtime.redaction import guard_outputs
from loanmesh.runtime.setting_rules import refusing
from loanmesh.runtime.settings import ServerSettings, ServiceSettings, load
from loanmesh.runtime.status import item_status, status_code
from loanmesh.runtime.supervised import end_with_supervisor
from loanmesh.runtime.validation import violations
from loanmesh.runtime.vitals import Vitals

# A server span is an error only for these (OpenTelemetry RPC conventions): the others are the caller's doing.
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
BUDGET_S_MIN = 0.002
"""A call with less time left than this is not begun: its answer could not arrive in time, and others wait."""
GC_THRESHOLDS = (10_000, 20, 50)
"""New objects before the collector looks at the young, and rounds before it looks at the older. What a call makes dies
by reference counts; cycles come from errors' tracebacks mainly."""
log = structlog.get_logger()


@dataclass(frozen=True)
class Service:
    """What a service's main hands to the process: servicers, their full names, and how to close what it opened."""

    registrations: Sequence[tuple[Callable[[Any, Any], None], object]]
    service_names: Sequence[str]
    close: Callable[[], Awaitable[None]] | None = None
    drain: Callable[[], Awaitable[None]] | None = None
    """Called on SIGTERM before the server stops: take no new work, finish or give back what is held."""
    vitals: Vitals = field(default_factory=Vitals)
    """What the process shows of itself."""


C = TypeVar("C", bound=ServiceSettings)


@refusing()
def run(name: str, settings_class: type[C], build: Callable[[C, Clock], Awaitable[Service]]) -> None:
    """Run a service until SIGTERM or SIGINT. Ends with 2 on wrong settings, with 1 where it cannot listen or reach."""
    settings = load(settings_class)
    owner = new_owner(name)
    telemetry.start_telemetry(name, owner, settings.telemetry)
    guard_outputs()
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:  # No wheel for this platform; the standard loop is slower and otherwise the same.
        runner = asyncio.Runner()
    with runner:
        runner.run(_serve(name, owner, settings, build))
    telemetry.stop_telemetry()


async def _serve(name: str, owner: str, settings: C, build: Callable[[C, Clock], Awaitable[Service]]) -> None:
    clock = SystemClock()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    end_with_supervisor(stopping.set)
    service = await build(settings, clock)
    server = make_server(settings.server, clock)
    door = cast(grpc.aio.Server, Generic(server))
    for add, servicer in service.registrations:
        add(servicer, door)
    heartbeat = Heartbeat(clock, telemetry.observe(service.vitals))
    add_OpsServiceServicer_to_server(ops.OpsServicer(name, owner, clock.now(), service.vitals, heartbeat), door)
    names = (*service.service_names, ops.SERVICE_NAME)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, door)
    _add_reflection(door, names)
    try:
        port = server.add_insecure_port(settings.server.listen)
    except RuntimeError as error:
        prefix = str(settings.model_config.get("env_prefix", ""))
        sys.stderr.write(
            f"{name}: cannot listen on {settings.server.listen}: the port is in use or not allowed; "
            f"{prefix}SERVER__LISTEN moves it (for the whole mesh: `loanmesh up --port-base`)\n"
        )
        raise SystemExit(1) from error
    await server.start()
    # What is there now stays: modules, contracts, policy. Looking through it again and again took 4 % of the CPU.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    pulse = [asyncio.create_task(heartbeat.beat_forever()), asyncio.create_task(service.vitals.sample_forever(clock))]
    # Liveness needs no more than this: a loop that hangs cannot answer the probe, and nothing else makes us restart.
    watched = ("", "readiness", "liveness", *names)
    for watched_name in watched:
        await healthy.set(watched_name, health_pb2.HealthCheckResponse.SERVING)
    host = settings.server.listen.rsplit(":", 1)[0]
    print(json.dumps({"ready": name, "address": f"{host}:{port}"}), flush=True)
    with profiled(name):
        await stopping.wait()
    service.vitals.draining = True
    for watched_name in watched:
        if watched_name != "liveness":
            await healthy.set(watched_name, health_pb2.HealthCheckResponse.NOT_SERVING)
    await clock.sleep(settings.server.leave_s)
    if service.drain:
        await service.drain()
    await server.stop(settings.server.drain_s)
    for task in pulse:
        task.cancel()
    await asyncio.wait(pulse)
    if service.close:
        await service.close()


def make_server(settings: ServerSettings, clock: Clock) -> grpc.aio.Server:
    """A server with our interceptor and limits, not yet listening."""
    megabytes = settings.max_message_mib * 1024 * 1024
    return grpc.aio.server(
        interceptors=[ServerInterceptor(clock)],
        options=[
            ("grpc.max_receive_message_length", megabytes),
            ("grpc.max_connection_age_ms", int(settings.max_connection_age_s * 1000)),
            # Grace longer than any deadline, so that aging ends no call.
            ("grpc.max_connection_age_grace_ms", 120_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.so_reuseport", 0),
        ],
    )


class Generic:
    """A server to which generated code adds its methods without registering each with the core.

    For registered methods grpcio 1.85 keeps one accepting task each and waits for any of them: every call then adds and
    removes a callback at all of them, which for intake's nineteen cost more than all else around a call together.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """As the server's."""
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Left out: the generic handlers serve the same methods."""


def _add_reflection(server: grpc.aio.Server, names: Sequence[str]) -> None:
    servicer = reflection.aio.ReflectionServicer([*names, "grpc.health.v1.Health"])
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)
    # grpcio serves v1alpha only; v1 is equal on the wire and is what newer tools ask for first.
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection._reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection._reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    generic = grpc.method_handlers_generic_handler(
        "grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": handler}
    )
    server.add_generic_rpc_handlers((generic,))


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Deadline, validation, trace, metrics and errors around every call of our own services; one place, one span."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tracer = trace.get_tracer("loanmesh")
        self._duration = metrics.get_meter("loanmesh").create_histogram(telemetry.SERVER_DURATION, unit="s")

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler; health and reflection pass through."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith("/lending."):
            return handler
        carrier = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        method = details.method.lstrip("/")
        if handler.unary_unary:
            behaviour = handler.unary_unary

            async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                with _Call(self, method, carrier, context) as call:
                    try:
                        await call.check(request)
                        return await behaviour(request, context)
                    except LoanmeshError as error:
                        await call.refuse(error)
                    except (grpc.aio.AbortError, grpc.RpcError, asyncio.CancelledError):
                        raise
                    except grpc.aio.InternalError as error:
                        raise call.gone() from error
                    except Exception as error:  # noqa: BLE001  The one edge where a bug becomes a status.
                        await call.bug(error)

            return grpc.unary_unary_rpc_method_handler(
                unary, _or_malformed(handler.request_deserializer), handler.response_serializer
            )
        behaviour = handler.unary_stream

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with _Call(self, method, carrier, context) as call:
                try:
                    await call.check(request)
                    async for response in behaviour(request, context):
                        yield response
                except LoanmeshError as error:
                    await call.refuse(error)
                except (grpc.aio.AbortError, grpc.RpcError, asyncio.CancelledError, GeneratorExit):
                    raise
                except grpc.aio.InternalError as error:
                    raise call.gone() from error
                except Exception as error:  # noqa: BLE001  The same edge, for streams.
                    await call.bug(error)

        return grpc.unary_stream_rpc_method_handler(
            stream, _or_malformed(handler.request_deserializer), handler.response_serializer
        )


_MALFORMED = object()
"""Stands for bytes that are no message. gRPC itself would answer UNKNOWN with the inner error's text."""


def _or_malformed(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_not(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _MALFORMED

    return read_or_not


class _Call:
    """One call under way: its span, its clock, its end."""

    def __init__(self, owner: ServerInterceptor, method: str, carrier: dict[str, str], context: Any) -> None:
        self._owner = owner
        self._method = method
        self._carrier = carrier
        self._context = context
        self._status = "OK"

    def __enter__(self) -> _Call:
        self._started = self._owner._clock.monotonic()
        self._left_s = self._context.time_remaining()
        deadline.note(None if self._left_s is None else self._started + self._left_s)
        self._scope = self._owner._tracer.start_as_current_span(
            self._method,
            context=propagate.extract(self._carrier),
            kind=trace.SpanKind.SERVER,
            attributes={telemetry.RPC_SYSTEM_NAME: "grpc", telemetry.RPC_METHOD: self._method},
        )
        self._span = self._scope.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._status = "CANCELLED"
        if self._span.is_recording():
            self._span.set_attribute(telemetry.RPC_STATUS_CODE, self._status)
            if self._status in _SERVER_FAULTS:
                self._span.set_status(trace.StatusCode.ERROR, self._status)
        self._scope.__exit__(None, None, None)
        took_s = self._owner._clock.monotonic() - self._started
        self._owner._duration.record(
            took_s, {telemetry.RPC_METHOD: self._method, telemetry.RPC_STATUS_CODE: self._status}
        )

    async def check(self, request: Any) -> None:
        """Refuse what comes too late to be answered, and what breaks the contract's rules."""
        if self._left_s is not None and self._left_s < BUDGET_S_MIN:
            self._status = "DEADLINE_EXCEEDED"
            await self._context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the call was begun"
            )
        if request is _MALFORMED:
            raise InvalidRequest(("request", "the bytes are no message of the type that this method takes"))
        if found := violations(request):
            raise InvalidRequest(*found)

    async def refuse(self, error: LoanmeshError) -> None:
        """Answer one of our own errors with its status and details."""
        self._status = status_code(error).name
        trailing: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", item_status(error).SerializeToString())]
        if isinstance(error, NotNow):
            trailing.append(("grpc-retry-pushback-ms", str(int(error.retry_s * 1000))))
        await self._context.abort(status_code(error), str(error), tuple(trailing))

    def gone(self) -> asyncio.CancelledError:
        """What to raise where the caller is gone: gRPC has no way left to say anything on this call."""
        self._status = "CANCELLED"
        return asyncio.CancelledError()

    async def bug(self, error: Exception) -> None:
        """Log what nobody expected, once, and answer without inner text."""
        self._status = "INTERNAL"
        log.error("call_failed", rpc_method=self._method, error_type=type(error).__name__, exc_info=error)
        await self._context.abort(grpc.StatusCode.INTERNAL, "internal error; the trace id leads to its cause")
