"""`loanmesh decide-firms`: the 302 unrated real firms, decided; may be repeated, and goes on where it was."""

from __future__ import annotations

import asyncio
import csv
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

import aiohttp
from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab.identity import real_firm_code
from lab.population import application_json
from loanmesh.cli import show
from loanmesh.client import Client
from loanmesh.runtime.clock import Clock

FILE = "cn_sme_firms_302_nocredit.csv"
# One namespace for ever: the same firm, amount and term make the same request, whenever they are sent.
_NAMESPACE = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


class CannotRead(Exception):
    """The data cannot be used; the text says where and why."""


def read_firms(folder: Path) -> list[str]:
    """Codes of the firms to decide on. Raises CannotRead naming file and line."""
    path = folder / FILE
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if "企业代号" not in (rows.fieldnames or ()):
                raise CannotRead(f"{path}:1: there is no column 企业代号")
            firms = []
            for row in rows:
                code = row["企业代号"]
                if not code or not code.removeprefix("E").isdecimal():
                    raise CannotRead(f"{path}:{rows.line_num}: 企业代号 must be E and a number, not {code!r}")
                firms.append(code)
    except OSError as error:
        raise CannotRead(f"{path}: {error.strerror}") from error
    return firms


async def teach(sandbox: str, folder: Path) -> None:
    """Have the sandbox play the tax authority for the firms in an absolute folder. Raises CannotRead."""
    url, body = f"http://{sandbox}/control/data", {"dir": str(folder)}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        if answer.status != 200:
            raise CannotRead(await answer.text())


async def decide_firms(
    console: Console, client: Client, firms: list[str], amount_fen: int, term_months: int, clock: Clock
) -> dict[str, pb.Application]:
    """Submit all, then wait for all; firm -> application as decided."""
    given = clock.now().replace(hour=0, minute=0, second=0, microsecond=0, month=1, day=1)
    found: dict[str, pb.Application] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        sent = progress.add_task("submitted", total=len(firms))
        done = progress.add_task("decided", total=len(firms))
        room = asyncio.Semaphore(64)

        async def one(firm: str) -> None:
            request = application_json(
                "firm", real_firm_code(firm), amount_fen, term_months, "补充流动资金", {}, given, "decide-firms"
            )
            application = json_format.ParseDict(request, pb.Application())
            key = str(uuid.uuid5(_NAMESPACE, f"{firm}:{application.SerializeToString(deterministic=True).hex()}"))
            async with room:
                stored = await client.submit(application, request_id=key)
                progress.advance(sent)
                async for changed in client.watch(stored.name):
                    stored = changed
                found[firm] = stored
                progress.advance(done)

        await asyncio.gather(*(one(firm) for firm in firms))
    return {firm: found[firm] for firm in firms}


def report(console: Console, decided: Mapping[str, pb.Application], took_s: float) -> None:
    """The table by outcome and grade, with rate and amount, and where the time went."""
    groups: dict[tuple[str, str], list[pb.Application]] = defaultdict(list)
    for application in decided.values():
        groups[(show.state_of(application), application.decision.grade)].append(application)
    rows = []
    for (outcome, grade), members in sorted(groups.items()):
        offers = [a.decision.offers[0] for a in members if a.decision.offers]
        rates = sorted(o.apr_ppm / 1e4 for o in offers)
        rate = f"{rates[0]:.2f} to {rates[-1]:.2f} %" if rates else "-"
        total = f"{sum(o.principal_fen for o in offers) / 100:,.0f}" if offers else "-"
        pd = sum(a.decision.pd for a in members) / len(members)
        rows.append((outcome, grade, len(members), f"{pd:.1%}", rate, total))
    columns = ("outcome", "grade", "firms", "mean PD", "rate a year", "offered, CNY")
    console.print(show.table(f"{len(decided)} firms", columns, rows))
    reasons = Counter(
        reason.code
        for a in decided.values()
        for reason in a.decision.reasons
        if reason.effect == type(reason).EFFECT_DECLINE
    )
    console.print(
        show.table("why declined (a firm may have several reasons)", ("reason", "firms"), reasons.most_common())
    )
    waits = sorted(
        (a.decision.decide_time.ToNanoseconds() - a.create_time.ToNanoseconds()) / 1e6 for a in decided.values()
    )
    console.print(
        f"took {took_s:.1f} s; from acknowledgement to decision: median {waits[len(waits) // 2]:.0f} ms,"
        f" slowest {waits[-1]:.0f} ms"
    )


def write_csv(path: Path, decided: Mapping[str, pb.Application]) -> None:
    """firm, application, outcome, grade, PD, amount, annual rate, term."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(("firm", "application", "outcome", "grade", "pd", "amount_cny", "annual_rate", "term_months"))
        for firm, a in decided.items():
            offer = a.decision.offers[0] if a.decision.offers else None
            terms = (offer.principal_fen / 100, offer.apr_ppm / 1e6, offer.term_months) if offer else ("", "", "")
            out.writerow((firm, a.name, show.state_of(a), a.decision.grade, f"{a.decision.pd:.6f}", *terms))
