"""The collector's configuration in two tiers: sound in itself, and, where a collector is at hand, tried on it.

LOANMESH_OTELCOL names a collector to try it on, LOANMESH_PROMTOOL a promtool for the rules; else they are looked for in
PATH. A collector without `loadbalancing` is tried with a plain exporter in its place, to the one gateway there is, and
one without `nop` without logs.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import StatusCode

from loanmesh.cli.mesh import free_ports
from loanmesh.runtime import semconv
from loanmesh.runtime.clock import SystemClock
from tests.otlp import collecting
from tests.prometheus import Emitted, series

FOLDER = Path("deploy/observability")
CLOCK = SystemClock()
HEALTHY = 40
SPLIT = 40
"""Traces of which each agent sees one half."""
BALANCES = "name: loadbalancing"
"""How a collector says that it has the load-balancing exporter, by its first name."""
CHOSEN = "${env:LOGS_EXPORTER:-nop}"
"""Where an agent sends logs is its environment's choice, between these two."""
RESOURCE = Resource.create(
    {"service.namespace": "loanmesh", "service.name": "intake", "service.instance.id": "intake-1"}
)


def tool(variable: str, *names: str) -> str:
    """Where a tool is; skips the test, saying so, where it is nowhere."""
    found = os.environ.get(variable) or next((path for name in names if (path := shutil.which(name))), "")
    if not found:
        pytest.skip(f"no {names[0]} here: {variable} may name one")
    return found


def config(tier: str) -> dict[str, Any]:
    """A tier's configuration as shipped."""
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "collector" / f"{tier}.yaml").read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("tier", ["agent", "gateway"])
def test_what_a_pipeline_uses_is_there_and_what_is_there_is_used(tier: str) -> None:
    loaded = config(tier)
    pipelines = loaded["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines for name in pipeline.get(kind, ())}
        if CHOSEN in used:
            used = used - {CHOSEN} | {"nop", "otlp/logs"}
        assert used == set(loaded[kind]), kind
    assert loaded["service"]["extensions"] == list(loaded["extensions"])
    for pipeline in pipelines:
        assert pipeline["processors"][0] == "memory_limiter", "what is refused must be refused before it costs anything"
        assert pipeline["processors"][-1] == "batch"


def test_the_tiers_fit_each_other() -> None:
    agent, gateway = config("agent"), config("gateway")
    assert agent["exporters"]["loadbalancing"]["routing_key"] == "traceID"
    balancing = agent["exporters"]["loadbalancing"]
    # What waits at the exporter of one gateway is lost with that gateway; what waits above goes to another.
    assert balancing["sending_queue"]
    assert balancing["retry_on_failure"]["enabled"]
    assert not balancing["protocol"]["otlp"]["sending_queue"]["enabled"]
    assert not balancing["protocol"]["otlp"]["retry_on_failure"]["enabled"]
    dns = balancing["resolver"]["dns"]
    assert gateway["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rsplit(":")[-1] == dns["port"]
    policies = {policy["name"]: policy for policy in gateway["processors"]["tail_sampling"]["policies"]}
    said = re.search(r'^KEPT_FOR = .*\n"""Why the trace is kept: ([^.]*)\.', inspect.getsource(semconv), re.MULTILINE)
    assert said
    # Sampled is what is kept without a reason: with it, everything would be.
    reasons = set(re.findall(r"\w+", said[1])) - {"sampled"}
    assert set(policies["kept_by_the_mesh"]["string_attribute"]["values"]) == reasons


def test_promtool_finds_the_rules_sound_and_each_alert_fires_when_it_must() -> None:
    promtool = tool("LOANMESH_PROMTOOL", "promtool")
    rules = FOLDER / "prometheus"
    files = [str(rules / name) for name in ("recording.yaml", "alerts.yaml")]
    tests = ["test", "rules", str(rules / "rules.test.yaml")]
    for words in (["check", "rules", "--lint=all", "--lint-fatal", *files], tests):
        done = subprocess.run([promtool, *words], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
async def tiers(tmp_path: Path) -> AsyncIterator[tuple[str, str, Any]]:
    """Agent and gateway running: address of the agent, its page of metrics, and what came out behind the gateway."""
    collector = tool("LOANMESH_OTELCOL", "otelcol-contrib", "otelcol")
    ports = list(free_ports().values())
    parts = await asyncio.to_thread(_components, collector)
    async with (
        collecting() as behind,
        _running(collector, tmp_path / "gateway.yaml", _gateway(ports[3], ports[4], behind.endpoint), ports[4]),
        _running(collector, tmp_path / "agent.yaml", _agent(ports[0], ports[1], ports[2], [ports[3]], parts), ports[1]),
    ):
        yield f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}/metrics", behind


def _agent(otlp: int, health: int, page: int, gateways: Sequence[int], parts: str) -> dict[str, Any]:
    """The agent's configuration for loopback, and for a collector that has these parts."""
    agent = config("agent")
    _listen(agent, otlp, health)
    agent["exporters"]["prometheus"]["endpoint"] = f"127.0.0.1:{page}"
    # Its pods are looked up in a cluster, and there is none here.
    del agent["processors"]["k8sattributes"]
    for pipeline in (agent["service"]["pipelines"][name] for name in ("traces", "logs")):
        pipeline["processors"].remove("k8sattributes")
    _send_to(agent, BALANCES in parts, gateways)
    if "name: nop" not in parts:
        del agent["exporters"]["nop"], agent["service"]["pipelines"]["logs"]
    return agent


def _gateway(otlp: int, health: int, behind: str) -> dict[str, Any]:
    """The gateway's configuration for loopback; it waits a second for a trace, and keeps none that is healthy."""
    gateway = config("gateway")
    _listen(gateway, otlp, health)
    gateway["processors"]["tail_sampling"]["decision_wait"] = "1s"
    gateway["exporters"]["otlp/traces"]["endpoint"] = behind.removeprefix("http://")
    gateway["processors"]["tail_sampling"]["policies"][-1]["probabilistic"]["sampling_percentage"] = 0
    return gateway


def _components(collector: str) -> str:
    return subprocess.run([collector, "components"], capture_output=True, text=True, timeout=30, check=True).stdout


def _listen(loaded: dict[str, Any], otlp: int, health: int) -> None:
    loaded["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] = f"127.0.0.1:{otlp}"
    loaded["extensions"]["health_check"]["endpoint"] = f"127.0.0.1:{health}"
    # Telemetry of the collectors themselves would want a fixed port.
    loaded["service"]["telemetry"] = {"metrics": {"level": "none"}}


def _send_to(agent: dict[str, Any], balances: bool, gateways: Sequence[int]) -> None:
    balancing = agent["exporters"].pop("loadbalancing")
    if balances:
        # Names are asked in a cluster; here they would all have one port.
        balancing["resolver"] = {"static": {"hostnames": [f"127.0.0.1:{gateway}" for gateway in gateways]}}
        agent["exporters"]["loadbalancing"] = balancing
    else:
        agent["exporters"]["otlp/plain"] = {**balancing["protocol"]["otlp"], "endpoint": f"127.0.0.1:{gateways[0]}"}
        agent["service"]["pipelines"]["traces"]["exporters"] = ["otlp/plain"]


@asynccontextmanager
async def _running(collector: str, file: Path, loaded: Mapping[str, Any], health: int) -> AsyncIterator[None]:
    await asyncio.to_thread(file.write_text, yaml.safe_dump(loaded), encoding="utf-8")
    with await asyncio.to_thread(file.with_suffix(".log").open, "w") as log:
        process = await asyncio.create_subprocess_exec(collector, "--config", str(file), stdout=log, stderr=log)
    try:
        await until(lambda: _answers(f"http://127.0.0.1:{health}"), file.with_suffix(".log").read_text)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _answers(url: str) -> bool:
    try:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def until(holds: Callable[[], Any], said: Callable[[], str] = str, within_s: float = 30.0) -> None:
    """Look again and again until it holds."""
    until_s = CLOCK.monotonic() + within_s
    while not await holds():
        assert CLOCK.monotonic() < until_s, said()
        await CLOCK.sleep(0.05)


async def test_traces_that_somebody_will_look_for_arrive_whole_and_the_healthy_are_thinned_out(
    tiers: tuple[str, str, Any],
) -> None:
    agent, _, behind = tiers
    provider = _provider(agent)
    tracer = provider.get_tracer("test")
    for number in range(HEALTHY):
        with tracer.start_as_current_span("healthy"), tracer.start_as_current_span(f"part {number}"):
            pass
    with tracer.start_as_current_span("failed"), tracer.start_as_current_span("inner") as span:
        span.set_status(StatusCode.ERROR, "UNAVAILABLE")
    with tracer.start_as_current_span("late"), tracer.start_as_current_span("attempt") as span:
        span.set_attribute("loanmesh.kept_for", "late")
    await asyncio.to_thread(provider.shutdown)

    async def there() -> bool:
        return {"failed", "inner", "late", "attempt"} <= set(behind.spans)

    await until(there, lambda: f"behind the gateway: {behind.spans}")
    assert "healthy" not in behind.spans


async def test_spans_of_one_trace_from_two_nodes_meet_in_one_of_two_gateways(tmp_path: Path) -> None:
    collector = tool("LOANMESH_OTELCOL", "otelcol-contrib", "otelcol")
    parts = await asyncio.to_thread(_components, collector)
    if BALANCES not in parts:
        pytest.skip("this collector has no load-balancing exporter")
    ports = iter([port for _ in range(3) for port in free_ports().values()])
    gateways, agents = [next(ports), next(ports)], [next(ports), next(ports)]
    async with AsyncExitStack() as running:
        behind = [await running.enter_async_context(collecting()) for _ in gateways]
        for number, (port, there) in enumerate(zip(gateways, behind, strict=True)):
            health, file = next(ports), tmp_path / f"gateway-{number}.yaml"
            loaded = _gateway(port, health, there.endpoint)
            await running.enter_async_context(_running(collector, file, loaded, health))
        for number, port in enumerate(agents):
            health, file = next(ports), tmp_path / f"agent-{number}.yaml"
            loaded = _agent(port, health, next(ports), gateways, parts)
            await running.enter_async_context(_running(collector, file, loaded, health))
        providers = [_provider(f"127.0.0.1:{port}") for port in agents]
        tracers = [provider.get_tracer("test") for provider in providers]
        for number in range(SPLIT):
            # Only the second half is worth keeping: who does not see both keeps half a trace.
            call, answer = f"call {number}", f"answer {number}"
            with tracers[0].start_as_current_span(call), tracers[1].start_as_current_span(answer) as span:
                span.set_status(StatusCode.ERROR, "UNAVAILABLE")
        for provider in providers:
            await asyncio.to_thread(provider.shutdown)

        async def there_are_all() -> bool:
            return sum(len(one.spans) for one in behind) >= 2 * SPLIT

        await until(there_are_all, lambda: f"behind the gateways: {[sorted(one.spans) for one in behind]}")
    met = [{name.split()[1] for name in one.spans} for one in behind]
    assert all(met), "each gateway has its share"
    assert not met[0] & met[1], "no trace went to both"


def _provider(endpoint: str) -> TracerProvider:
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, insecure=True)))
    return provider


async def test_prometheus_sees_the_names_that_rules_are_written_in(tiers: tuple[str, str, Any]) -> None:
    agent, page, _ = tiers
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=agent, insecure=True))
    meter = MeterProvider([reader], resource=RESOURCE)
    made = meter.get_meter("test")
    made.create_histogram("loanmesh.decision.duration", unit="s").record(1, {"loanmesh.priority": "bulk"})
    made.create_counter("loanmesh.source.spend", unit="{fen}").add(5, {"loanmesh.source": "tax"})
    made.create_gauge("loanmesh.backlog", unit="{application}").set(3)
    made.create_gauge("loanmesh.backlog.age", unit="s").set(3)
    made.create_up_down_counter("loanmesh.breaker.state", unit="{breaker}").add(1, {"loanmesh.breaker.state": "open"})
    made.create_histogram("loanmesh.estimate.quotient", unit="1").record(1)
    await asyncio.to_thread(meter.shutdown)
    said = ""

    async def there() -> bool:
        nonlocal said
        async with aiohttp.ClientSession() as session, session.get(page) as answer:
            said = await answer.text()
        return "loanmesh_backlog" in said

    await until(there, lambda: said)
    shown = {
        name: frozenset(re.findall(r'(\w+)="', labels))
        for name, labels in re.findall(r"^(loanmesh_\w+)\{(.*)\} ", said, re.MULTILINE)
    }
    scope = frozenset({"otel_scope_name", "otel_scope_version", "otel_scope_schema_url"})
    assert {name: labels - scope for name, labels in shown.items()} == {
        name: labels
        for metric in (
            Emitted("loanmesh.decision.duration", "histogram", "s", frozenset({"loanmesh.priority"})),
            Emitted("loanmesh.source.spend", "counter", "{fen}", frozenset({"loanmesh.source"})),
            Emitted("loanmesh.backlog", "gauge", "{application}", frozenset()),
            Emitted("loanmesh.backlog.age", "gauge", "s", frozenset()),
            Emitted("loanmesh.breaker.state", "gauge", "{breaker}", frozenset({"loanmesh.breaker.state"})),
            Emitted("loanmesh.estimate.quotient", "histogram", "1", frozenset()),
        )
        for name, labels in series(metric).items()
    }
    assert 'job="loanmesh/intake"' in said
    assert 'instance="intake-1"' in said
