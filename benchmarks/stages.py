"""What bureau, scoring and pricing cost an application by themselves: their batch methods, called in this process.

From the bytes of a request to the bytes of its answer, validation included; gRPC, telemetry and the generator left
out. For a change to one of them this says in seconds what it is worth; what the mesh costs, `core` says.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from google.protobuf import json_format
from google.protobuf.message import Message
from lending.bureau.v1.bureau_service_pb2 import GatherProfilesRequest
from lending.intake.v1.intake_service_pb2 import Application
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest
from lending.scoring.v1.scoring_service_pb2 import ScoreProfilesRequest
from lending.type.v1.party_pb2 import Party

from benchmarks.bench import Bench, Found, figure, table
from benchmarks.machine import child
from lab.population import Kind, Population
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.identity import age_on
from loanmesh.runtime.keys import new_ring, write_ring
from loanmesh.runtime.server import Service
from loanmesh.runtime.validation import violations
from services.bureau.main import build as build_bureau
from services.bureau.settings import BureauSettings
from services.pricing.main import build as build_pricing
from services.pricing.settings import PricingSettings
from services.scoring.main import build as build_scoring
from services.scoring.settings import ScoringSettings

BATCHES = (1, 8, 64)
KINDS: tuple[Kind, ...] = ("person", "firm")
CONTEXT = cast(Any, None)
"""None of the batch methods asks anything of the call it is in."""
LENDER = "lenders/demo"


@dataclass(frozen=True)
class Stage:
    """One batch method, and the items it is asked about."""

    name: str
    method: Callable[[Any, Any], Awaitable[Message]]
    request: type[Any]
    """The class of its requests, which hold `items`."""
    items: Sequence[Message]


async def measure(bench: Bench) -> Found:
    """Each stage at each size of batch."""
    count, rounds = bench.size(512, 64), bench.size(7, 1)
    measured: dict[str, dict[str, float]] = {}
    async with _bureau(bench) as bureau:
        for stage in await _stages(bench, bureau, count):
            measured[stage.name] = {
                str(size): min([await _us_each(stage, size) for _ in range(rounds)]) for size in BATCHES
            }
        measured["bureau, cold"] = {}
        for number, size in enumerate(BATCHES, 1):
            # Of subjects that nobody has asked about: each costs a query to each source.
            stage = _gathering("bureau, cold", bureau, _applications(bench, number * count, count // 2))
            measured[stage.name][str(size)] = await _us_each(stage, size)
    rows = [(name, *(figure(us) for us in sizes.values())) for name, sizes in measured.items()]
    header = ("CPU us an application, in batches of", *(str(size) for size in BATCHES))
    return Found(rows=[], markdown=[table(header, rows)], measured=measured)


async def _us_each(stage: Stage, size: int) -> float:
    """CPU an item, microseconds. Callers take the best round: what else runs here can only add."""
    batches = [stage.items[at : at + size] for at in range(0, len(stage.items), size)]
    asked = [stage.request(items=batch).SerializeToString() for batch in batches]
    started = time.process_time()
    for request in asked:
        await _answer(stage.method, stage.request.FromString(request))
    return (time.process_time() - started) / len(stage.items) * 1e6


async def _answer(method: Callable[[Any, Any], Awaitable[Message]], request: Message) -> bytes:
    assert not violations(request)
    return (await method(request, CONTEXT)).SerializeToString()


async def _stages(bench: Bench, bureau: Service, count: int) -> list[Stage]:
    """Bureau warm, scoring and pricing, each asked with what the stage before it answered; half persons, half firms."""
    applications = _applications(bench, 0, count)
    gathering = _gathering("bureau, warm", bureau, applications)
    profiles = [result.profile for result in await _all(gathering)]
    asked = cast(Sequence[GatherProfilesRequest.Item], gathering.items)
    scored = [
        ScoreProfilesRequest.Item(
            key=item.key,
            party_kind=item.party.kind,
            profile=profile,
            declaration=application.declaration,
            age_years=_age(item.party, bench.clock),
        )
        for item, application, profile in zip(asked, applications, profiles, strict=True)
    ]
    score = _method(await build_scoring(ScoringSettings(), bench.clock), "ScoreProfiles")
    scoring = Stage("scoring", score, ScoreProfilesRequest, scored)
    priced = [
        PriceApplicationsRequest.Item(
            key=item.key,
            lender=LENDER,
            party_kind=item.party_kind,
            loan=application.loan,
            declaration=application.declaration,
            profile=item.profile,
            score=result.score,
            age_years=item.age_years if item.HasField("age_years") else None,
        )
        for item, application, result in zip(scored, applications, await _all(scoring), strict=True)
    ]
    price = _method(await build_pricing(PricingSettings(), bench.clock), "PriceApplications")
    return [gathering, scoring, Stage("pricing", price, PriceApplicationsRequest, priced)]


async def _all(stage: Stage) -> list[Any]:
    """What it answers to all its items."""
    batches = [stage.items[at : at + 64] for at in range(0, len(stage.items), 64)]
    answers: list[Any] = [await stage.method(stage.request(items=batch), CONTEXT) for batch in batches]
    return [result for answer in answers for result in answer.results]


def _gathering(name: str, bureau: Service, applications: Sequence[Application]) -> Stage:
    items = [
        GatherProfilesRequest.Item(
            key=f"{LENDER}/applications/{index}/assessments/1",
            lender=LENDER,
            party=application.parties[0],
            consents=application.consents,
        )
        for index, application in enumerate(applications)
    ]
    return Stage(name, _method(bureau, "GatherProfiles"), GatherProfilesRequest, items)


@asynccontextmanager
async def _bureau(bench: Bench) -> AsyncIterator[Service]:
    """A bureau with an empty cache and the sandbox behind it, whose CPU is not ours."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = ("-m", "lab.sandbox", "--port", "0", "--state", folder, "--seed", str(bench.seed))
        _, ready = await stack.enter_async_context(child(*command, cores=bench.cores.outside))
        write_ring(keys := Path(folder) / "keys.json", new_ring(bench.clock.now()), new=True)
        service = await build_bureau(
            BureauSettings.model_validate(
                {
                    "database_url": f"sqlite:///{Path(folder) / 'bureau.db'}",
                    "privacy": {"keys_file": str(keys)},
                    "sources_url": f"http://{json.loads(ready)['address']}",
                    # A query that is late would make a profile cheaper.
                    "gather": {"budget_s": 30.0, "timeout_s": 30.0},
                }
            ),
            bench.clock,
        )
        assert service.close
        stack.push_async_callback(service.close)
        yield service


def _method(service: Service, name: str) -> Callable[[Any, Any], Awaitable[Message]]:
    ((_, servicer),) = service.registrations
    return cast(Callable[[Any, Any], Awaitable[Message]], getattr(servicer, name))


def _applications(bench: Bench, first: int, count: int) -> list[Application]:
    population, now = Population(bench.seed), bench.clock.now()
    return [
        json_format.ParseDict(population.application(KINDS[index % 2], index, now), Application())
        for index in range(first, first + count)
    ]


def _age(party: Party, clock: Clock) -> int | None:
    return age_on(party.identity.value, clock.now().date()) if party.kind == Party.KIND_PERSON else None
