"""Every RPC of every service under thousands of odd requests, on a real mesh with a store: what comes back, what stays.

Each RPC has a declared set of statuses; INTERNAL and UNKNOWN are in none of them, nor may an item of a batch carry
them. Afterwards nothing has leaked, no log tells what a caller sent, and a good application is decided as before.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import code_pb2
from lending.bureau.v1 import bureau_service_pb2 as bureau
from lending.bureau.v1.bureau_service_pb2_grpc import BureauServiceStub
from lending.intake.v1 import erasure_service_pb2 as erasure
from lending.intake.v1 import intake_service_pb2 as intake
from lending.intake.v1 import parking_service_pb2 as parking
from lending.intake.v1.intake_service_pb2_grpc import IntakeServiceStub
from lending.ops.v1 import ops_service_pb2 as ops
from lending.ops.v1.ops_service_pb2_grpc import OpsServiceStub
from lending.pricing.v1 import pricing_service_pb2 as pricing
from lending.pricing.v1.pricing_service_pb2_grpc import PricingServiceStub
from lending.scoring.v1 import scoring_service_pb2 as scoring
from lending.scoring.v1.scoring_service_pb2_grpc import ScoringServiceStub

from lab.drills import free_base
from lab.fuzz import messages, odd
from lab.outside import SERVICES, Outside, Replica
from lab.population import Kind, Population
from lab.rows import Row, at_least, at_most
from loanmesh.runtime.clock import Clock

LENDER = "lenders/demo"
AT_ONCE = 24
"""Requests under way at once."""
CALL_S = 10.0
"""Who has not answered by then hangs."""
WATCH_S = 0.5
"""How long a stream of changes is looked at."""
SETTLED_WITHIN_S = 60.0
RSS_MIB_MAX = 96.0
"""Growth of a process that is no leak: caches that were cold, and what the allocator keeps."""
FILES_MAX = 40
TASKS_MAX = 40
ALWAYS = frozenset({"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
"""RESOURCE_EXHAUSTED: too large, or too much at once."""
BROKEN_ITEMS = (code_pb2.INTERNAL, code_pb2.UNKNOWN)
_UNREADABLE = "metadata size exceeds"
_AGED = "max_age"
"""An old connection ended just as the call began, and no server saw it: asked once more, as callers do."""
_TROUBLE = re.compile(r'Traceback \(most recent call last\)|"level": ?"(error|critical)"')
_MEANT = re.compile(r'"event": ?"(dependency_overridden|breaker_changed|subject_erased)"')
"""What an operator gives as actor and reason is written down on purpose: it is the record of who ordered what."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """One RPC, and how it may end."""

    service: str
    full_name: str
    request: type[Message]
    response: type[Message]
    statuses: frozenset[str]
    streams: bool = False


@dataclass
class Found:
    """What one RPC's requests led to."""

    statuses: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    """How to make each request again that led to what was not declared, and to what."""


def methods() -> list[Method]:
    """Every RPC of the contract, with its declared statuses beyond the ones that any may have."""
    declared: Mapping[str, set[str]] = {
        "SubmitApplication": {"ALREADY_EXISTS"},
        "GetApplication": {"NOT_FOUND"},
        "WatchApplication": {"NOT_FOUND", "DEADLINE_EXCEEDED"},
        "SupplyInformation": {"NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS"},
        "AcceptOffer": {"NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS"},
        "WithdrawApplication": {"NOT_FOUND", "FAILED_PRECONDITION", "ALREADY_EXISTS"},
        "ExplainDecision": {"NOT_FOUND", "FAILED_PRECONDITION"},
        "ReplayDecision": {"NOT_FOUND", "FAILED_PRECONDITION"},
        "ListEvents": {"NOT_FOUND"},
        "OverrideDependency": {"NOT_FOUND", "ALREADY_EXISTS"},
    }
    # Ops is served by all; bureau has the dependencies.
    served_by = (
        ("intake", intake), ("intake", parking), ("intake", erasure), ("bureau", bureau), ("scoring", scoring),
        ("pricing", pricing), ("bureau", ops),
    )  # fmt: skip
    return [
        Method(
            service,
            f"{described.full_name}/{one.name}",
            getattr(module, one.input_type.name),
            getattr(module, one.output_type.name),
            ALWAYS | declared.get(one.name, set()),
            one.server_streaming,
        )
        for service, module in served_by
        for described in module.DESCRIPTOR.services_by_name.values()
        for one in described.methods
    ]


@asynccontextmanager
async def a_mesh(folder: Path) -> AsyncIterator[tuple[Outside, dict[str, Replica]]]:
    """A mesh of one replica each, and its processes by service."""
    mesh = Outside(folder / "state", ["--port-base", str(free_base())], {})
    try:
        await mesh.start()
        yield mesh, {replica.service: replica for replica in await mesh.replicas()}
    finally:
        await mesh.stop()


# --- What sound requests look like ---


async def examples(replicas: Mapping[str, Replica], now: dt.datetime) -> dict[type[Message], list[Message]]:
    """Sound requests of each type, about applications that are there."""
    channels = {service: grpc.aio.insecure_channel(replicas[service].address) for service in SERVICES}
    try:
        submits = [_submit(kind, number, now) for kind in ("person", "firm") for number in range(12)]
        front = IntakeServiceStub(channels["intake"])
        names = []
        for submit in submits:
            submit.wait.FromSeconds(20)
            names.append((await front.SubmitApplication(submit, timeout=30)).application.name)
            submit.ClearField("wait")
        bare = _submit("person", 99, now)
        del bare.application.consents[:]
        waiting = (await front.SubmitApplication(bare, timeout=30)).application.name
        found: dict[type[Message], list[Message]] = {
            intake.SubmitApplicationRequest: [*submits, bare],
            intake.BatchSubmitApplicationsRequest: [
                intake.BatchSubmitApplicationsRequest(parent=LENDER, requests=submits[at : at + 3])
                for at in (0, 11, 20)
            ],
            **dict(_about([*names, waiting])),
            parking.ReleaseApplicationsRequest: [
                parking.ReleaseApplicationsRequest(names=names[:2], request_id="release-1", actor="sre", reason="why")
            ],
            intake.ListApplicationsRequest: [
                intake.ListApplicationsRequest(parent=LENDER, page_size=5, filter="state = DECIDED AND channel != x"),
                intake.ListApplicationsRequest(parent=LENDER, page_size=5, order_by="create_time"),
            ],
            parking.ListParkedApplicationsRequest: [parking.ListParkedApplicationsRequest(page_size=5, cause="x")],
            erasure.EraseSubjectRequest: [
                erasure.EraseSubjectRequest(
                    parent=LENDER, identity=submit.application.parties[0].identity, actor="sre", validate_only=True
                )
                for submit in submits[:3]
            ],
            bureau.EraseSubjectRequest: [
                bureau.EraseSubjectRequest(lender=LENDER, identity=submit.application.parties[0].identity)
                for submit in submits[:3]
            ],
            scoring.ListModelsRequest: [scoring.ListModelsRequest()],
            ops.GetStatusRequest: [ops.GetStatusRequest()],
            ops.ListDependenciesRequest: [ops.ListDependenciesRequest()],
            ops.OverrideDependencyRequest: [
                ops.OverrideDependencyRequest(
                    name="dependencies/bank_flow", request_id="override-1", override=ops.OVERRIDE_AUTOMATIC, actor="sre"
                )
            ],
        }
        found |= await _inner(channels, submits[:3] + submits[12:15])
        return found
    finally:
        await asyncio.gather(*(channel.close() for channel in channels.values()))


def _submit(kind: Kind, number: int, now: dt.datetime) -> intake.SubmitApplicationRequest:
    application = json_format.ParseDict(Population().application(kind, number, now), intake.Application())
    request_id = f"fuzz-{kind}-{number:04d}"
    return intake.SubmitApplicationRequest(parent=LENDER, request_id=request_id, application=application)


def _about(names: Sequence[str]) -> Iterator[tuple[type[Message], list[Message]]]:
    """Requests about one application each."""
    plain = (
        intake.GetApplicationRequest, intake.WatchApplicationRequest, intake.ExplainDecisionRequest,
        intake.ReplayDecisionRequest,
    )  # fmt: skip
    for kind in plain:
        yield kind, [kind(name=name) for name in names]
    yield intake.ListEventsRequest, [intake.ListEventsRequest(parent=name, page_size=3) for name in names]
    yield (
        intake.AcceptOfferRequest,
        [intake.AcceptOfferRequest(name=name, request_id="accept-01", offer_id="offer-1") for name in names],
    )
    yield (
        intake.WithdrawApplicationRequest,
        [intake.WithdrawApplicationRequest(name=name, request_id="withdraw-1") for name in names],
    )
    supplies: list[Message] = []
    for name in names:
        supply = intake.SupplyInformationRequest(name=name, request_id="supply-01")
        supply.consents.add(source="tax", purpose=1).given_time.FromSeconds(1_700_000_000)
        supply.declaration.monthly_income_fen = 1_000_000
        supplies.append(supply)
    yield intake.SupplyInformationRequest, supplies


async def _inner(
    channels: Mapping[str, grpc.aio.Channel], submits: Sequence[intake.SubmitApplicationRequest]
) -> dict[type[Message], list[Message]]:
    """What intake would ask the others about these, and the answers of one for the next."""
    gather = bureau.GatherProfilesRequest()
    for number, submit in enumerate(submits):
        party = submit.application.parties[0]
        gather.items.add(key=f"k{number}", lender=LENDER, party=party, consents=submit.application.consents)
    profiles = (await BureauServiceStub(channels["bureau"]).GatherProfiles(gather, timeout=CALL_S)).results
    score = scoring.ScoreProfilesRequest()
    for submit, got in zip(submits, profiles, strict=True):
        application = submit.application
        score.items.add(key=got.key, party_kind=application.parties[0].kind, profile=got.profile, age_years=40)
    scores = (await ScoringServiceStub(channels["scoring"]).ScoreProfiles(score, timeout=CALL_S)).results
    price = pricing.PriceApplicationsRequest()
    for submit, got, scored in zip(submits, profiles, scores, strict=True):
        application = submit.application
        price.items.add(
            key=got.key, lender=LENDER, party_kind=application.parties[0].kind, loan=application.loan,
            declaration=application.declaration, profile=got.profile, score=scored.score, age_years=40,
        )  # fmt: skip
    await PricingServiceStub(channels["pricing"]).PriceApplications(price, timeout=CALL_S)
    schedule = pricing.ScheduleRepaymentsRequest()
    schedule.items.add(principal_fen=1_000_000, apr_ppm=144_000, term_months=12)
    return {
        bureau.GatherProfilesRequest: [gather],
        scoring.ScoreProfilesRequest: [score],
        pricing.PriceApplicationsRequest: [price],
        pricing.ScheduleRepaymentsRequest: [schedule],
    }


# --- Odd ones, and what becomes of them ---


async def fuzz(
    method: Method, sound: Sequence[Message], channel: grpc.aio.Channel, seed: int, count: int, say: Say
) -> Found:
    """So many odd requests to one RPC."""
    found = Found()
    numbers = iter(range(count))

    async def hand() -> None:
        for number in numbers:
            dice = random.Random(f"{seed}:{method.full_name}:{number}")
            data = messages.request(sound, dice)
            status, wrong = await _send(method, channel, data)
            found.statuses[status] += 1
            if wrong:
                found.unexpected.append(f"--seed {seed} --only {method.full_name} --at {number}: {wrong}")

    await asyncio.gather(*(hand() for _ in range(AT_ONCE)))
    told = ", ".join(f"{status} {times}" for status, times in found.statuses.most_common())
    say(f"{method.full_name}: {told}" + (f"; {len(found.unexpected)} UNEXPECTED" if found.unexpected else ""))
    for line in found.unexpected[:3]:
        say(f"    {line}")
    return found


async def _send(method: Method, channel: grpc.aio.Channel, data: bytes, *, again: bool = False) -> tuple[str, str]:
    """How it ended, and what is wrong with that; '' where nothing is."""
    allowed = method.statuses
    timeout_s = WATCH_S if method.streams else CALL_S
    asked = messages.readable(method.request, data)
    if isinstance(asked, intake.SubmitApplicationRequest) and asked.HasField("wait"):
        # Who asks to wait is let wait, but not for a minute.
        timeout_s, allowed = 1.0, allowed | {"DEADLINE_EXCEEDED"}
    try:
        answers = await _answers(method, channel, data, timeout_s)
    except grpc.aio.AioRpcError as error:
        status, details = error.code().name, error.details() or ""
        if status == "UNAVAILABLE" and _AGED in details and not again:
            return await _send(method, channel, data, again=True)
        # An answer too large for whoever asked is no answer, though gRPC calls it by a status that may be.
        told = status in allowed and _UNREADABLE not in details
        return status, "" if told else f"{status}: {details}"
    broken = [result for answer in answers for result in _results(answer) if result.error.code in BROKEN_ITEMS]
    return "OK", f"an item is {broken[0].error}" if broken else ""


async def _answers(method: Method, channel: grpc.aio.Channel, data: bytes, timeout_s: float) -> list[Any]:
    path, read = f"/{method.full_name}", method.response.FromString
    if method.streams:
        return [answer async for answer in channel.unary_stream(path, bytes, read)(data, timeout=timeout_s)]
    return [await channel.unary_unary(path, bytes, read)(data, timeout=timeout_s)]


def _results(answer: Any) -> Sequence[Any]:
    """The items of a batch's answer that can fail one by one."""
    named = answer.DESCRIPTOR.fields_by_name.get("results")
    return getattr(answer, "results", ()) if named and "error" in named.message_type.fields_by_name else ()


# --- What stays ---


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    rss_mib: float
    files: int
    tasks: int


async def held(replica: Replica) -> Held:
    """What it holds now."""
    async with grpc.aio.insecure_channel(replica.address) as channel:
        tasks = (await OpsServiceStub(channel).GetStatus(ops.GetStatusRequest(), timeout=CALL_S)).tasks
    return Held(*_of_process(replica.pid), tasks)


def _of_process(pid: int) -> tuple[float, int]:
    """Memory, MiB, and open files."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    rss_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    return rss_kib / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def settled(replica: Replica, before: Held, clock: Clock) -> Held:
    """What it holds once what was begun is over, or after long enough."""
    give_up = clock.monotonic() + SETTLED_WITHIN_S
    while True:
        now = await held(replica)
        calm = now.tasks <= before.tasks + TASKS_MAX and now.files <= before.files + FILES_MAX
        if calm or clock.monotonic() > give_up:
            return now
        await clock.sleep(0.2)


def log_faults(state: Path) -> tuple[list[str], list[str]]:
    """Lines of the services' logs that tell of a bug, and lines that hold what a caller sent."""
    bugs, echoes = [], []
    for log in sorted((state / "logs").rglob("*.log")) or sorted(state.rglob("*.log")):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if _TROUBLE.search(line):
                bugs.append(f"{log.name}: {line[:300]}")
            if odd.PLANTED in line and not _MEANT.search(line):
                echoes.append(f"{log.name}: {line[:300]}")
    return bugs, echoes


async def decides(replicas: Mapping[str, Replica], number: int, now: dt.datetime, patience_s: float = 60.0) -> bool:
    """Whether a good application is decided."""
    async with grpc.aio.insecure_channel(replicas["intake"].address) as channel:
        submit = _submit("person", number, now)
        submit.wait.FromSeconds(int(patience_s))
        answer = await IntakeServiceStub(channel).SubmitApplication(submit, timeout=patience_s + 5)
        return answer.application.state == intake.Application.STATE_DECIDED


async def _give_back(replica: Replica) -> None:
    """Undo what overrides did."""
    async with grpc.aio.insecure_channel(replica.address) as channel:
        stub = OpsServiceStub(channel)
        for one in (await stub.ListDependencies(ops.ListDependenciesRequest(), timeout=CALL_S)).dependencies:
            await stub.OverrideDependency(
                ops.OverrideDependencyRequest(
                    name=one.name, request_id=f"back-{one.name[-20:]}".replace("/", "-"),
                    override=ops.OVERRIDE_AUTOMATIC, actor="fuzz",
                ),
                timeout=CALL_S,
            )  # fmt: skip


async def run(folder: Path, seed: int, count: int, only: str, clock: Clock, say: Say) -> list[Row]:
    """All RPCs, or those whose name holds `only`, so many requests each; then look at what stayed."""
    async with a_mesh(folder) as (mesh, replicas):
        sound = await examples(replicas, clock.now())
        chosen = [method for method in methods() if only in method.full_name]
        channels = {service: grpc.aio.insecure_channel(replicas[service].address) for service in SERVICES}
        for method in chosen:  # Warm: caches filled, code imported.
            await fuzz(
                method, sound[method.request], channels[method.service], seed - 1, min(count, 50), lambda _: None
            )
        before = {service: await held(replicas[service]) for service in SERVICES}
        found = {}
        for method in chosen:
            found[method.full_name] = await fuzz(
                method, sound[method.request], channels[method.service], seed, count, say
            )
        await _give_back(replicas["bureau"])
        good = await decides(replicas, 5000 + seed % 1000, clock.now())
        await asyncio.gather(*(channel.close() for channel in channels.values()))
        after = {service: await settled(replicas[service], before[service], clock) for service in SERVICES}
        alive = await mesh.replicas()
        bugs, echoes = log_faults(mesh.state)
        restarts = sum(now.pid != replicas[now.service].pid for now in alive)
    for line in [*bugs[:5], *echoes[:5]]:
        say(f"    log: {line}")
    rows = [
        at_least("requests an RPC", min(one.statuses.total() for one in found.values()), "requests", count),
        at_least("RPCs", len(found), "RPCs", len(chosen)),
        at_most("answers that no RPC declares", sum(len(one.unexpected) for one in found.values()), "answers", 0),
        at_most("processes that crashed", restarts + len(mesh.crashes()), "processes", 0),
        at_most("bugs told in logs", len(bugs), "lines", 0),
        at_most("planted text in logs", len(echoes), "lines", 0),
        at_least("good applications decided afterwards", float(good), "applications", 1),
    ]
    for service in SERVICES:
        grown = after[service].rss_mib - before[service].rss_mib
        rows.append(at_most(f"{service}: memory grown", round(grown, 1), "MiB", RSS_MIB_MAX))
        files = after[service].files - before[service].files
        rows.append(at_most(f"{service}: open files more", files, "files", FILES_MAX))
        tasks = after[service].tasks - before[service].tasks
        rows.append(at_most(f"{service}: tasks more", tasks, "tasks", TASKS_MAX))
    return rows


async def again(folder: Path, seed: int, full_name: str, number: int, clock: Clock, say: Say) -> None:
    """Make one request again, and say what became of it."""
    async with a_mesh(folder) as (mesh, replicas):
        sound = await examples(replicas, clock.now())
        method = next(method for method in methods() if method.full_name == full_name)
        data = messages.request(sound[method.request], random.Random(f"{seed}:{full_name}:{number}"))
        kept = Path("build/fuzz-request.binpb")
        kept.write_bytes(data)  # noqa: ASYNC240  Once, by a command.
        say(f"request, {len(data)} bytes, kept in {kept}")
        say(f"as read: {messages.readable(method.request, data)}"[:4000])
        async with grpc.aio.insecure_channel(replicas[method.service].address) as channel:
            say(f"answer: {await _send(method, channel, data)}")
        for line in chain(*log_faults(mesh.state)):
            say(f"log: {line}")
