"""The sandbox: one process that plays five sources for a synthetic population, with faults on demand.

    python -m lab.sandbox --port 7405 --state DIR [--data DIR] [--seed N]

POST /v1/{source}/query       {"kind": ..., "value": ..., "query": MARK}
                              -> {"query": MARK, "observed_at": ..., "facts": {...}}, or 404
GET, POST /control/faults     {"source": "tax" or "*", "latency_ms", "jitter_ms", "error_rate", "dead", "hang",
                              "garbage", "quota_per_s"}
POST /control/data            {"dir": ...}: plays the tax authority for the real firms too; remembered in --state
GET /control/stats            queries by source and kind of answer
GET /control/application/{person|firm}/{index}   the application that subject would send
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from lab.identity import PERSONS_MAX, REAL_FIRMS_FROM, firm_index, person_index
from lab.population import SOURCES, Kind, Population
from loanmesh.runtime.clock import Clock, SystemClock
from loanmesh.runtime.supervised import end_with_supervisor


@dataclass(frozen=True)
class Fault:
    """How a source behaves."""

    latency_ms: float = 5.0
    jitter_ms: float = 2.0
    error_rate: float = 0.0
    dead: bool = False
    """Connections are cut without an answer."""
    hang: bool = False
    """Never answers."""
    garbage: bool = False
    """Answers nonsense."""
    quota_per_s: float = 0.0
    """Queries a second it takes; the others are answered 429. 0: as many as come."""


class Quota:
    """A token bucket of one second: a burst of a second's worth at most."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left = 0.0
        self._at = float("-inf")

    def takes(self, per_s: float) -> bool:
        """Whether one more query is within so many a second."""
        now = self._clock.monotonic()
        burst = max(1.0, per_s)
        self._left = min(burst, self._left + (now - self._at) * per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Sandbox:
    """Answers for a population; `state` keeps what must outlive a restart."""

    def __init__(self, population: Population, state: Path, clock: Clock, dice: random.Random) -> None:
        self._population = population
        self._state = state
        self._clock = clock
        self._dice = dice
        self._faults = {source: Fault() for source in SOURCES}
        self._quotas = {source: Quota(clock) for source in SOURCES}
        self._stats: Counter[str] = Counter()
        self._real: dict[str, dict[str, Any]] = {}
        state.mkdir(parents=True, exist_ok=True)
        if self._remembered.is_file():
            self._real = json.loads(self._remembered.read_text(encoding="utf-8"))

    @property
    def _remembered(self) -> Path:
        return self._state / "real-firms.json"

    def app(self) -> web.Application:
        """The HTTP application."""
        app = web.Application()
        app.router.add_post("/v1/{source}/query", self.query)
        app.router.add_get("/control/faults", self.get_faults)
        app.router.add_post("/control/faults", self.set_faults)
        app.router.add_post("/control/data", self.load_data)
        app.router.add_get("/control/stats", self.stats)
        app.router.add_get(r"/control/application/{kind:person|firm}/{index:\d{1,9}}", self.application)
        return app

    async def query(self, request: web.Request) -> web.StreamResponse:
        """One source's answer about one subject."""
        source = request.match_info["source"]
        if source not in self._faults:
            raise web.HTTPNotFound(text="no such source")
        fault = self._faults[source]
        try:
            body = await request.json()
            kind, value = str(body["kind"]), str(body["value"])
            mark = {"query": str(body["query"])} if "query" in body else {}
        except (ValueError, KeyError, TypeError) as error:
            raise web.HTTPBadRequest(text="the body must be an object with kind and value") from error
        if fault.quota_per_s and not self._quotas[source].takes(fault.quota_per_s):
            self._stats[f"{source}:over_quota"] += 1
            return web.json_response({**mark, "error": "over quota"}, status=429)
        await self._clock.sleep(max(0.0, fault.latency_ms + self._dice.uniform(-1, 1) * fault.jitter_ms) / 1000)
        if fault.dead and request.transport:
            self._stats[f"{source}:dead"] += 1
            request.transport.abort()
            return web.Response(status=503)
        if fault.hang:
            self._stats[f"{source}:hang"] += 1
            await asyncio.Event().wait()
        if self._dice.random() < fault.error_rate:
            self._stats[f"{source}:error"] += 1
            return web.json_response({**mark, "error": "busy"}, status=503)
        if fault.garbage:
            self._stats[f"{source}:garbage"] += 1
            return web.json_response({**mark, "observed_at": "yesterday", "facts": {"tax.sales_12m_fen": "many"}})
        self._stats[f"{source}:answered"] += 1
        facts = self._facts(source, kind, value)
        said = {**mark, "observed_at": self._clock.now().isoformat(), "facts": facts or {}}
        return web.json_response(said, status=404 if facts is None else 200)

    def _facts(self, source: str, kind: str, value: str) -> dict[str, Any] | None:
        readers = {"resident_id": person_index, "unified_social_credit_code": firm_index}
        index = readers[kind](value) if kind in readers else None
        if index is None:
            return None
        if kind != "resident_id" and index >= REAL_FIRMS_FROM:
            return self._real_facts(source, f"E{index - REAL_FIRMS_FROM}")
        subject = self._population.subject("person" if kind == "resident_id" else "firm", index)
        if source == "central_bank" and not subject.registered:
            return None
        prefix = {"central_bank": "credit.", "bank_flow": "bank."}.get(source, f"{source}.")
        return {name: fact for name, fact in subject.facts.items() if name.startswith(prefix)}

    def _real_facts(self, source: str, firm: str) -> dict[str, Any] | None:
        """The tax authority speaks from the invoices; the other sources know nothing bad, and say so."""
        tax = self._real.get(firm)
        if tax is None or source == "central_bank":
            return None
        return {
            "tax": {f"tax.{name}": value for name, value in tax.items()},
            "registry": {"registry.is_active": True, "registry.age_months": tax["months_active"] + 24},
            "court": {"court.enforcement_open_count": 0, "court.is_dishonest_debtor": False},
            "bank_flow": {
                "bank.monthly_inflow_fen": max(0, tax["sales_12m_fen"]) // 12,
                "bank.months_covered": min(12, tax["months_active"]),
            },
        }[source]

    async def get_faults(self, request: web.Request) -> web.Response:
        """How each source behaves."""
        return web.json_response({source: asdict(fault) for source, fault in self._faults.items()})

    async def set_faults(self, request: web.Request) -> web.Response:
        """Change it."""
        try:
            change = dict(await request.json())
            source = change.pop("source", "*")
            if source != "*" and source not in self._faults:
                raise ValueError(f"source must be * or one of {', '.join(SOURCES)}")
            made = {name: _changed(self._faults[name], change) for name in (SOURCES if source == "*" else (source,))}
        except (ValueError, TypeError) as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        self._faults.update(made)
        return await self.get_faults(request)

    async def load_data(self, request: web.Request) -> web.Response:
        """Read the real firms' invoices and remember their facts."""
        try:
            folder = Path((await request.json())["dir"])
            count = await asyncio.to_thread(self.read_real_firms, folder)
        except (KeyError, TypeError, ValueError) as error:
            raise web.HTTPBadRequest(text="the body must be an object with dir") from error
        except (OSError, ImportError) as error:
            raise web.HTTPBadRequest(text=f"cannot read the invoices: {error}") from error
        return web.json_response({"firms": count})

    def read_real_firms(self, folder: Path) -> int:
        """Compute the facts of the real firms, once; how many there are."""
        if not self._real:
            from lab.invoices import read_invoices, tax_facts

            self._real = tax_facts(read_invoices(folder))
            # Whole or not at all: half a file would stop the next start.
            half = self._remembered.with_suffix(".new")
            half.write_text(json.dumps(self._real), encoding="utf-8")
            half.replace(self._remembered)
        return len(self._real)

    async def stats(self, request: web.Request) -> web.Response:
        """How often each source was asked."""
        return web.json_response(dict(self._stats))

    async def application(self, request: web.Request) -> web.Response:
        """What a subject would send."""
        kind: Kind = "person" if request.match_info["kind"] == "person" else "firm"
        index = int(request.match_info["index"])
        if index >= (PERSONS_MAX if kind == "person" else REAL_FIRMS_FROM):
            raise web.HTTPNotFound(text="no such synthetic subject")
        return web.json_response(self._population.application(kind, index, self._clock.now()))


def _changed(fault: Fault, change: dict[str, Any]) -> Fault:
    changed = replace(fault, **change)
    for name, value in asdict(changed).items():
        if isinstance(getattr(Fault, name), bool):
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false")
        elif not 0 <= float(value) <= (1 if name == "error_rate" else 600_000):
            raise ValueError(f"{name} is out of range")
    return changed


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    clock = SystemClock()
    sandbox = Sandbox(Population(arguments.seed), arguments.state, clock, random.Random(arguments.seed))
    if arguments.data:
        try:
            await asyncio.to_thread(sandbox.read_real_firms, arguments.data)
        except (OSError, ImportError) as error:
            raise SystemExit(f"sandbox: cannot read the invoices: {error}") from error
    runner = web.AppRunner(sandbox.app(), access_log=None, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, arguments.host, arguments.port)
    try:
        await site.start()
    except OSError as error:
        raise SystemExit(f"sandbox: port {arguments.port} is in use; `loanmesh up --port-base` moves it") from error
    port = runner.addresses[0][1]
    print(json.dumps({"ready": "sandbox", "address": f"{arguments.host}:{port}"}), flush=True)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    end_with_supervisor(stopping.set)
    await stopping.wait()
    await runner.cleanup()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=7405)
    parser.add_argument("--state", type=Path, required=True, help="folder for what must outlive a restart")
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--seed", type=int, default=1)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
