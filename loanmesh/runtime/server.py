"""A service's process: start, serve, drain. All four services run through `run`."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import grpc
import structlog
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from lending.ops.v1.ops_service_pb2_grpc import add_OpsServiceServicer_to_server

from loanmesh.runtime import (
    caller,
    deadline,
    io_threads,
    measures,
    open_health,
    ops,
    semconv,
    telemetry,
    tracing,
    unfolding,
)
from loanmesh.runtime.clock import Clock, SystemClock, new_owner
from loanmesh.runtime.door import Door
from loanmesh.runtime.errors import InvalidRequest, LoanmeshError, NotNow
from loanmesh.runtime.limits import probe_options, server_options
from loanmesh.runtime.loop_lag import Heartbeat
from loanmesh.runtime.open_health import OpenHealth
from loanmesh.runtime.profile import profiled
from loanmesh.runtime.redaction import guard_outputs
from loanmesh.runtime.setting_rules import refusing
from loanmesh.runtime.settings import ServerSettings, ServiceSettings, load
from loanmesh.runtime.status import item_status, status_code
from loanmesh.runtime.supervised import end_with_supervisor
from loanmesh.runtime.tls import server_certificates
from loanmesh.runtime.validation import violations
from loanmesh.runtime.vitals import Vitals

# A server span is an error only for these (OpenTelemetry RPC conventions): the others are the caller's doing.
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
_SHED = "RESOURCE_EXHAUSTED"
SLOW_CALL_S = 1.0
BUDGET_S_MIN = 0.002
"""A call with less time left than this is not begun: its answer could not arrive in time, and others wait."""
GC_THRESHOLDS = (10_000, 20, 50)
"""New objects before the collector looks at the young, and rounds before it looks at the older. What a call makes dies
by reference counts; cycles come from errors' tracebacks mainly."""
OURS = ("/lending.", "/externalscaler.")
"""Methods that we answer for: our contracts, and what KEDA asks. Health and reflection are gRPC's own."""
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
    prefix = str(settings.model_config.get("env_prefix", ""))
    certificates = server_certificates(name, prefix, settings, clock)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    end_with_supervisor(stopping.set)
    service = await build(settings, clock)
    door = certificates.door() if certificates else None
    slow_call_s = settings.telemetry.slow_call_s
    servers = [make_server(settings.server, clock, door, slow_call_s)]
    credentials = certificates.credentials() if certificates else None
    addresses = {"address": _listen(servers[0], settings.server.listen, credentials, f"{prefix}SERVER__LISTEN")}
    if certificates and settings.server.token_listen:
        # A server of its own: what strangers do there takes no connection away from those with certificates.
        servers.append(make_server(settings.server, clock, door, slow_call_s, by_token=True))
        credentials = certificates.credentials(client_certificates=False)
        knob = f"{prefix}SERVER__TOKEN_LISTEN"
        addresses["tokens"] = _listen(servers[1], settings.server.token_listen, credentials, knob)
    heartbeat = Heartbeat(clock, telemetry.observe(service.vitals))
    calls = telemetry.histogram(measures.SERVER_CALL)
    operations = ops.OpsServicer(name, owner, clock.now(), service.vitals, heartbeat, calls)
    names = (*service.service_names, ops.SERVICE_NAME)
    healthy = health.aio.HealthServicer()
    for server in servers:
        unregistered = cast(grpc.aio.Server, Unregistered(server))
        for add, servicer in service.registrations:
            add(servicer, unregistered)
        add_OpsServiceServicer_to_server(operations, unregistered)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, unregistered)
        _add_reflection(unregistered, names)
        await server.start()
    # What is there now stays: modules, contracts, policy. Looking through it again and again took 4 % of the CPU.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    probed = _probe_server(settings.server, healthy)
    if probed:
        knob = f"{prefix}SERVER__HEALTH_LISTEN"
        addresses["health"] = _listen(probed, settings.server.health_listen, None, knob)
        await probed.start()
    forever = [heartbeat.beat_forever(), service.vitals.sample_forever(clock)]
    if io_threads.can_be_scheduled():
        forever.append(io_threads.IoThreads(clock).look_forever())
    if certificates:
        forever.append(certificates.watch_forever())
    pulse = [asyncio.create_task(each) for each in forever]
    # Liveness needs no more than this: a loop that hangs cannot answer the probe, and nothing else makes us restart.
    watched = ("", "readiness", "liveness", *names)
    for watched_name in watched:
        await healthy.set(watched_name, health_pb2.HealthCheckResponse.SERVING)
    print(json.dumps({"ready": name, **addresses}), flush=True)
    with profiled(name):
        await stopping.wait()
    service.vitals.draining = True
    for watched_name in watched:
        if watched_name != "liveness":
            await healthy.set(watched_name, health_pb2.HealthCheckResponse.NOT_SERVING)
    await clock.sleep(settings.server.leave_s)
    if service.drain:
        await service.drain()
    await asyncio.gather(*(server.stop(settings.server.drain_s) for server in servers))
    if probed:
        await probed.stop(0)
    for task in pulse:
        task.cancel()
    await asyncio.wait(pulse)
    if service.close:
        await service.close()


def make_server(
    settings: ServerSettings,
    clock: Clock,
    door: Door | None = None,
    slow_call_s: float = SLOW_CALL_S,
    *,
    by_token: bool = False,
) -> grpc.aio.Server:
    """A server with our interceptor and limits, not yet listening.

    door  decides who may call what; None: callers are who they say, and may call all.
    slow_call_s  from which duration on a call's span is kept, whether its trace is sampled or not.
    by_token  callers have no certificates, so that metadata alone says who calls: strangers are refused on it.
    """
    message_mib = settings.max_message_mib
    if by_token:
        message_mib = min(message_mib, settings.token_message_max_mib)
    return grpc.aio.server(
        interceptors=[ServerInterceptor(clock, door, slow_call_s, by_token=by_token)],
        options=server_options(settings.limits, message_mib, settings.max_connection_age_s),
    )


class Unregistered:
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


def _listen(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None, knob: str) -> str:
    """Take the port; answers HOST:PORT as it is now. Ends the process with 1 where the port is not to be had."""
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        sys.stderr.write(
            f"cannot listen on {listen}: the port is in use or not allowed; "
            f"{knob} moves it (for the whole mesh: `loanmesh up --port-base`)\n"
        )
        raise SystemExit(1) from error
    return f"{listen.rsplit(':', 1)[0]}:{port}"


def _probe_server(settings: ServerSettings, healthy: health.aio.HealthServicer) -> grpc.aio.Server | None:
    """Serves health and nothing else, in plaintext, where a port for it is set: probes bring no certificate."""
    if not settings.health_listen:
        return None
    server = grpc.aio.server(options=probe_options(settings.limits))
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    return server


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
    """Caller, deadline, validation, trace, metrics and errors around every call of our own services; one place, one
    span."""

    def __init__(
        self, clock: Clock, door: Door | None = None, slow_call_s: float = SLOW_CALL_S, *, by_token: bool = False
    ) -> None:
        self._clock = clock
        self._door = door
        self._by_token = by_token
        self._slow_call_s = slow_call_s
        # By path; of methods that there are, so that strangers cannot fill it.
        self._wrapped: dict[str, Any] = {}
        self._health = OpenHealth()
        self._duration = telemetry.recorder(measures.SERVER_CALL)

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wrap the handler; of health, reflection and the like only the caller is looked at."""
        metadata = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        # The handler runs in this task, after us.
        caller.note_said(metadata)
        wrapped = self._wrapped.get(details.method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None:
                return None
            wrapped = self._wrapped[details.method] = self._wrap(handler, details.method)
        if self._door and self._by_token:
            try:
                self._door.enter({}, metadata, details.method.lstrip("/"))
            except LoanmeshError as error:
                # Without their traceparent: strangers do not choose what is recorded.
                caller.note_said({})
                return self._refusing(error, details.method.lstrip("/"))
        return wrapped

    def _wrap(self, handler: Any, path: str) -> Any:
        """The handler that answers all calls of a method."""
        method = path.lstrip("/")
        if self._by_token and path.startswith(open_health.PREFIX):
            return self._health.handler(handler)
        if not path.startswith(OURS):
            return handler if self._door is None else _behind(self._door, handler, method)
        read = _or_malformed(handler.request_deserializer)
        # Generated code hands over the message's own FromString.
        kind = handler.request_deserializer.__self__.DESCRIPTOR
        if handler.unary_unary:
            behaviour = handler.unary_unary

            async def unary(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                with _Call(self, method, context) as call:
                    try:
                        return await behaviour(await call.checked(read, kind, data), context)
                    except LoanmeshError as error:
                        await call.refuse(error)
                    except (grpc.aio.AbortError, grpc.RpcError, asyncio.CancelledError):
                        raise
                    except grpc.aio.InternalError as error:
                        raise call.gone() from error
                    except Exception as error:  # noqa: BLE001  The one edge where a bug becomes a status.
                        await call.bug(error)

            # Bytes until we know who sent them.
            return grpc.unary_unary_rpc_method_handler(unary, bytes, handler.response_serializer)
        behaviour = handler.unary_stream

        async def stream(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with _Call(self, method, context) as call:
                call.may_take_s = float("inf")  # A stream lasts as long as its reader likes.
                try:
                    async for response in behaviour(await call.checked(read, kind, data), context):
                        yield response
                except LoanmeshError as error:
                    await call.refuse(error)
                except (grpc.aio.AbortError, grpc.RpcError, asyncio.CancelledError, GeneratorExit):
                    raise
                except grpc.aio.InternalError as error:
                    raise call.gone() from error
                except Exception as error:  # noqa: BLE001  The same edge, for streams.
                    await call.bug(error)

        return grpc.unary_stream_rpc_method_handler(stream, bytes, handler.response_serializer)

    def _refusing(self, error: LoanmeshError, method: str) -> Any:
        """Answers a call without taking its message: gRPC receives those of a stream when they are asked for."""

        async def answers(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            with _Call(self, method, context) as call:
                await call.refuse(error)

        return grpc.stream_stream_rpc_method_handler(answers, bytes, bytes)


def _behind(door: Door, handler: Any, method: str) -> Any:
    """The same handler, for those who may call it."""

    async def enter(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        try:
            door.enter(context.auth_context(), caller.said(), method)
        except LoanmeshError as error:
            details = (("grpc-status-details-bin", item_status(error).SerializeToString()),)
            await context.abort(status_code(error), str(error), details)

    behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

    async def answers(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await enter(context)
        return await behaviour(request, context)

    async def yields(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        await enter(context)
        async for response in behaviour(request, context):
            yield response

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    # Some streams, health's among them, are written to by coroutines.
    return make(
        yields if inspect.isasyncgenfunction(behaviour) else answers,
        handler.request_deserializer,
        handler.response_serializer,
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

    def __init__(self, owner: ServerInterceptor, method: str, context: Any) -> None:
        self._owner = owner
        self._method = method
        self._context = context
        self._status = "OK"
        self._told: dict[str, str] = {}
        self._items: Sequence[Any] = ()
        self.may_take_s = owner._slow_call_s
        """Longer than this, seconds, is slow."""

    def __enter__(self) -> _Call:
        self._started = self._owner._clock.monotonic()
        self._left_s = self._context.time_remaining()
        deadline.note(None if self._left_s is None else self._started + self._left_s)
        self._span = tracing.enter(caller.said().get("traceparent", ""))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace_back: Any) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._status = "CANCELLED"
            if self._left_s is not None and (self._context.time_remaining() or 0.0) <= 0.0:
                self._status = "DEADLINE_EXCEEDED"  # gRPC ends the handler when the caller's time is up.
        ended = self._owner._clock.monotonic()
        took_s = ended - self._started
        wrong = self._status if self._status in _SERVER_FAULTS or self._status == _SHED else ""
        slow = took_s > self.may_take_s
        if slow or wrong:
            self._told[semconv.KEPT_FOR] = "shed" if wrong == _SHED else "failed" if wrong else "slow"
        recorder, span = tracing.recorder(), self._span
        if recorder and span:
            for each in (span, *span.items):
                keep = each.kept or slow or bool(wrong)
                if keep or each.brings:
                    call = tracing.Call(
                        self._method, "server", each.at, each.parent, self._started, ended, self._status, self._told,
                        wrong,
                    )  # fmt: skip
                    recorder.ended(call, keep)
            if self._items:
                self._tell_items(recorder, ended, wrong)
        self._owner._duration(took_s, {semconv.RPC_METHOD: self._method, semconv.RPC_STATUS_CODE: self._status})

    def _begin(self, request: Any) -> None:
        """Note what the request says of how it wants to be followed."""
        wait = getattr(request, "wait", None)
        if wait is not None:
            # A caller who asks to wait for a decision does not make the call slow by it.
            self.may_take_s += wait.seconds + wait.nanos / 1e9
        self._items = getattr(request, "items", ())

    def _tell_items(self, recorder: tracing.Recorder, ended: float, wrong: str) -> None:
        """The call as each followed item of a batch saw it, in the item's own trace."""
        for item in self._items:
            traceparent = getattr(item, "traceparent", "")
            # Bureau tells of its items by itself, with what the sources did; but not of a call that broke.
            if not traceparent or (not wrong and self._method.endswith("/GatherProfiles")):
                continue
            if at := tracing.place_of(traceparent):
                attributes = {
                    semconv.APPLICATION_ID: tracing.application_of(item.key), semconv.RPC_SYSTEM_NAME: "grpc",
                    semconv.RPC_METHOD: self._method, semconv.RPC_STATUS_CODE: self._status, **self._told,
                }  # fmt: skip
                if wrong:
                    attributes[semconv.ERROR_TYPE] = wrong
                recorder.tell(
                    self._method, tracing.Place(at.trace_id, recorder.new_id()), at.span_id,
                    recorder.at(self._started), recorder.at(ended), kind="server", attributes=attributes, error=wrong,
                )  # fmt: skip

    async def checked(self, read: Callable[[bytes], Any], kind: Descriptor, data: bytes) -> Any:
        """The request. Refuses who may not call, what comes too late to be answered, and what breaks the contract's
        rules, in this order."""
        door = self._owner._door
        who = door.enter(self._context.auth_context(), caller.said(), self._method) if door else None
        caller.note(who)
        if self._left_s is not None and self._left_s < BUDGET_S_MIN:
            self._status = "DEADLINE_EXCEEDED"
            self._told = {semconv.REASON: "DEADLINE_PASSED"}
            await self._context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the call was begun"
            )
        if unfolding.is_too_much(data, kind):
            raise InvalidRequest(("request", f"has more than {unfolding.FIELDS_MAX:,} fields, all levels together"))
        request = read(data)
        if request is _MALFORMED:
            raise InvalidRequest(("request", "the bytes are no message of the type that this method takes"))
        if found := violations(request):
            raise InvalidRequest(*found)
        if door and who:
            door.check_lender(who, self._method, request)
        self._begin(request)
        return request

    async def refuse(self, error: LoanmeshError) -> None:
        """Answer one of our own errors with its status and details."""
        self._status = status_code(error).name
        self._told = {semconv.REASON: error.reason}
        if isinstance(error, NotNow):
            # What a caller did wrong may quote the caller; what is wrong with us does not.
            self._told[semconv.CAUSE] = tracing.short(str(error))
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
        self._told = {semconv.EXCEPTION_TYPE: type(error).__name__}
        log.error("call_failed", rpc_method=self._method, error_type=type(error).__name__, exc_info=error)
        await self._context.abort(grpc.StatusCode.INTERNAL, "internal error; the trace id leads to its cause")
