"""`loanmesh decide-firms`: the 302 unrated real firms, decided; may be repeated, and goes on where it was."""

from __future__ import annotations

import asyncio
import csv
import datetime as dt
import io
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
from loanmesh.cli.jsontext import line_and_column
from loanmesh.cli.stages import ACKNOWLEDGE, COMMIT, Stages
from loanmesh.client import Client
from loanmesh.runtime.clock import Clock

FILE = "cn_sme_firms_302_nocredit.csv"
COLUMN = "企业代号"
# The same firm, amount and term make the same request, whenever they are sent: nothing in it may depend on today.
_GIVEN = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
"""The day the sandbox's firms are taken to have consented."""
_NAMESPACE = uuid.UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


class CannotRead(Exception):
    """The data cannot be used; the text says where and why."""


def read_firms(folder: Path) -> list[str]:
    """Codes of the firms to decide on. Raises CannotRead naming file, line and column."""
    path = folder / FILE
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CannotRead(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        line, column = line_and_column(before, len(before))
        raise CannotRead(f"{path}:{line}:{column}: byte {content[error.start]:#04x} is not UTF-8") from error
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    firms = []
    try:
        header = next(rows, [])
        if COLUMN not in header:
            raise CannotRead(f"{path}:1:1: there is no column {COLUMN}")
        index = header.index(COLUMN)
        for row in rows:
            code = row[index] if index < len(row) else ""
            if not (code.startswith("E") and code[1:].isascii() and code[1:].isdecimal() and len(code) <= 7):
                # Right where no cell before is quoted, as in this file.
                column = 1 + sum(len(cell) + 1 for cell in row[:index])
                text = f"{COLUMN} must be E and a number of up to 6 digits, not {code!r}"
                raise CannotRead(f"{path}:{rows.line_num}:{column}: {text}")
            firms.append(code)
    except csv.Error as error:
        raise CannotRead(f"{path}:{rows.line_num}:1: {error}") from error
    return firms


async def teach(sandbox: str, folder: Path) -> None:
    """Have the sandbox play the tax authority for the firms in an absolute folder. Raises CannotRead."""
    url, body = f"http://{sandbox}/control/data", {"dir": str(folder)}
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        if answer.status != 200:
            raise CannotRead(await answer.text())


async def decide_firms(
    console: Console,
    client: Client,
    firms: list[str],
    amount_fen: int,
    term_months: int,
    clock: Clock,
    stages: Stages | None = None,
) -> dict[str, pb.Application]:
    """Submit all, then wait for all; firm -> application as decided. What took how long goes to `stages`."""
    found: dict[str, pb.Application] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        sent = progress.add_task("submitted", total=len(firms))
        done = progress.add_task("decided", total=len(firms))
        room = asyncio.Semaphore(64)

        async def one(firm: str) -> None:
            application, key = request_for(firm, amount_fen, term_months)
            async with room:
                sent_at = clock.monotonic()
                stored = await client.submit(application, request_id=key)
                acknowledged_s = clock.monotonic() - sent_at
                progress.advance(sent)
                is_new = not stored.HasField("decision")
                async for changed in client.watch(stored.name):
                    stored = changed
                # What an earlier run decided says nothing of this one.
                if stages and is_new:
                    stages.note(ACKNOWLEDGE, acknowledged_s)
                    stages.note(COMMIT, clock.now().timestamp() - stored.decision.decide_time.ToNanoseconds() / 1e9)
                found[firm] = stored
                progress.advance(done)

        await asyncio.gather(*(one(firm) for firm in firms))
    return {firm: found[firm] for firm in firms}


def request_for(firm: str, amount_fen: int, term_months: int) -> tuple[pb.Application, str]:
    """What a firm asks for, and its request id; the same for ever for the same firm, amount and term."""
    code = real_firm_code(firm)
    request = application_json("firm", code, amount_fen, term_months, "补充流动资金", {}, _GIVEN, "decide-firms")
    application = json_format.ParseDict(request, pb.Application())
    return application, str(uuid.uuid5(_NAMESPACE, f"{firm}:{application.SerializeToString(deterministic=True).hex()}"))


def report(console: Console, decided: Mapping[str, pb.Application], took_s: float, stages: Stages) -> None:
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
    console.print(stages.table())


def check_writable(path: Path) -> None:
    """Raise OSError where a file cannot be written; leaves what is there, or nothing."""
    was_there = path.exists()
    with path.open("ab"):
        pass
    if not was_there:
        path.unlink()


def cny(fen: int) -> str:
    """Whole CNY, or two decimals where there are fen."""
    return str(fen // 100) if fen % 100 == 0 else f"{fen // 100}.{fen % 100:02d}"


def write_csv(path: Path, decided: Mapping[str, pb.Application]) -> None:
    """firm, application, outcome, grade, PD, amount in CNY, annual rate as a fraction, term. Raises OSError."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(("firm", "application", "outcome", "grade", "pd", "amount_cny", "annual_rate", "term_months"))
        for firm, a in decided.items():
            offer = a.decision.offers[0] if a.decision.offers else None
            terms = (
                (cny(offer.principal_fen), f"{offer.apr_ppm / 1e6:.6f}", offer.term_months) if offer else ("", "", "")
            )
            out.writerow((firm, a.name, show.state_of(a), a.decision.grade, f"{a.decision.pd:.6f}", *terms))
