"""A promotion: for twenty seconds ten times as many applications as can be decided, because one source has a quota.

Every application is about a subject the mesh has not seen, so each needs one answer of the tax authority, which gives
only so many a second. That bounds deciding well below what can be accepted and stored, as in real life. Nothing may
fail; everything must be decided about as soon as the quota allows; and each caller must be told when.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from urllib.request import Request, urlopen

from benchmarks import ours, pictures
from benchmarks.bench import Bench, Found, at_least, at_most, figure, table
from benchmarks.generator import Decided, Played, backlog, decisions, traffic
from lab.traffic import OK, Record, summarise
from loanmesh.cli.mesh import Mesh
from loanmesh.client import Client

BEFORE_S = 5.0
"""Seconds of quiet before the spike, at half of what can be decided."""
FACTOR = 10
ESTIMATE_SLACK_S = 1.0
"""An estimate is right within 25 % of the wait, or within this: none is given in finer steps than a second."""


async def set_fault(mesh: Mesh, source: str, **fault: object) -> None:
    """Change how a source behaves."""
    url = f"http://{mesh.parts['sandbox'].address}/control/faults"
    body = json.dumps({"source": source, **fault}).encode()

    def post() -> None:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=10) as answer:
            answer.read()

    await asyncio.to_thread(post)


async def measure(bench: Bench) -> Found:
    """One spike and its end."""
    quota, spike_s = bench.size(60, 20), bench.size(20, 1)
    seconds = BEFORE_S + spike_s
    async with (
        ours.our_mesh(bench) as mesh,
        Client(mesh.parts["intake"].address) as client,
    ):
        await set_fault(mesh, "tax", quota_per_s=quota)
        # Half the capacity before, ten times the capacity during; every arrival another subject.
        played = await traffic(
            bench, mesh.parts["intake"].address, shape="spike", rate=quota / 2, factor=2 * FACTOR, spike_at_s=BEFORE_S,
            spike_s=spike_s, seconds=seconds, subjects=int(quota * FACTOR * seconds),
        )  # fmt: skip
        bench.say("promotion: all sent; waiting until all are decided")
        await ours.all_decided(client, bench.clock, 5 * FACTOR * spike_s + 60, poll_s=0.5)
        decided = await decisions(client)
    return _judge(bench, played, decided, quota, spike_s)


def _judge(bench: Bench, played: Played, decided: Mapping[str, Decided], quota: int, spike_s: int) -> Found:
    acknowledged = [record for record in played.records if record.answer.outcome == OK]
    spike = [record for record in played.records if record.at_s >= BEFORE_S]
    start = min(one.created_at for one in decided.values())
    ends = max(one.created_at for one in decided.values())
    waiting = sum(1 for one in decided.values() if one.decided_at > ends)
    drain_s = max(one.decided_at for one in decided.values()) - ends
    due_s = waiting / quota
    wait_ms = summarise(spike, spike_s, 2.0)
    right = estimates_right(acknowledged, decided)
    rate = waiting / drain_s if drain_s else float("inf")
    at_s, counts = backlog(decided)
    pictures.lines(
        bench.pictures / "promotion.svg",
        f"A promotion: {FACTOR} times what can be decided, for {spike_s} s",
        ("seconds", "stored and not yet decided"),
        [pictures.Line("loanmesh", at_s, counts, ours=True)],
        marked={f"{FACTOR}x arrivals": (ends - start - spike_s, ends - start)},
    )
    rows = [
        at_most("promotion: failed", len(played.records) - len(acknowledged), "applications", 0, timed=False),
        at_most("promotion: acknowledged but not decided", sum(r.answer.name not in decided for r in acknowledged),
                "applications", 0, timed=False),
        at_most("promotion: until all are decided / backlog over capacity", drain_s / due_s, "ratio", 1.2),
        at_most("promotion: acknowledgement p99", wait_ms.p99_ms or float("inf"), "ms", 250),
        at_least("promotion: estimates within 25 %", right, "share", 0.9),
    ]  # fmt: skip
    shown = table(
        ("", "figure"),
        [
            ("capacity: the source's quota, a second", quota),
            ("arrivals in the spike, a second", figure(len(spike) / spike_s)),
            ("backlog when the spike ended", f"{waiting:,}"),
            ("backlog / capacity", f"{due_s:.1f} s"),
            ("until the last was decided", f"{drain_s:.1f} s"),
            ("decided a second meanwhile", figure(rate)),
            ("acknowledgement p50 / p99 / max", f"{wait_ms.p50_ms} / {wait_ms.p99_ms} / {wait_ms.max_ms} ms"),
            ("estimates within 25 % of the wait, or a second", f"{right:.1%}"),
        ],
    )
    return Found(rows, [shown], {"report": played.report["all"], "backlog": {"at_s": at_s, "count": counts}})


def estimates_right(acknowledged: Sequence[Record], decided: Mapping[str, Decided]) -> float:
    """Share of acknowledged ones whose estimate was near enough."""
    judged = []
    for record in acknowledged:
        one = decided.get(record.answer.name)
        if one and record.answer.estimate_at is not None:
            slack_s = max(0.25 * (one.decided_at - one.created_at), ESTIMATE_SLACK_S)
            judged.append(abs(record.answer.estimate_at - one.decided_at) <= slack_s)
    return sum(judged) / len(judged) if judged else 1.0
