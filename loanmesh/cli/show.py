"""How the command shows things to a person."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable
from typing import Any, Literal

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from lending.intake.v1 import intake_service_pb2 as pb
from lending.type.v1.reason_pb2 import Reason
from rich.console import Console
from rich.markup import escape
from rich.table import Table

COLOURS = {"APPROVED": "green", "COUNTER_OFFER": "yellow", "DECLINED": "red", "PENDING": "cyan"}
MARKS = {
    Reason.EFFECT_DECLINE: "✗", Reason.EFFECT_REDUCE: "↓", Reason.EFFECT_NEAR_MISS: "~", Reason.EFFECT_ADVERSE: "-",
    Reason.EFFECT_FAVOURABLE: "+", Reason.EFFECT_DEFER: "…", Reason.EFFECT_WAIVED: "○",
}  # fmt: skip

Language = Literal["zh", "en", "both"]
ZH = {
    "funding": "资金成本", "expected_loss": "预期损失", "operating_cost": "运营成本", "capital": "资本成本",
    "margin": "利润", "market_bound": "上下限调整", "evidence": "证据", "model": "模型", "policy": "政策",
    "central_bank": "央行征信", "tax": "税务发票", "registry": "工商登记", "court": "法院执行信息",
    "bank_flow": "银行流水",
    "fresh": "最新", "stale": "较旧", "missing": "缺失", "no_consent": "未授权", "not_found": "无记录",
    "month": "期数", "payment": "还款额", "principal": "本金", "interest": "利息", "balance": "剩余本金",
}  # fmt: skip
"""What the frame of an explanation says, in Chinese."""


def as_json(message: Message) -> str:
    """One line of JSON, for machines."""
    return json.dumps(json_format.MessageToDict(message), ensure_ascii=False)


def state_of(application: pb.Application) -> str:
    """Outcome once decided, else the state."""
    if application.HasField("decision"):
        outcome = pb.Decision.Outcome.Name(application.decision.outcome).removeprefix("OUTCOME_")
        state = pb.Application.State.Name(application.state).removeprefix("STATE_")
        return outcome if state == "DECIDED" else state
    return pb.Application.State.Name(application.state).removeprefix("STATE_")


def time_of(stamp: Timestamp) -> str:
    """Local time, to the second."""
    return stamp.ToDatetime(dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def yuan(fen: int) -> str:
    """Fen as CNY."""
    return f"{fen / 100:,.2f} CNY"


def application(console: Console, one: pb.Application) -> None:
    """One application: where it stands, and what comes next."""
    state = state_of(one)
    colour = COLOURS.get(state, "bold")
    console.print(f"[bold]{escape(one.name)}[/]  [{colour}]{state}[/]")
    console.print(f"  asked     {yuan(one.loan.amount_fen)} over {one.loan.term_months} months")
    if one.HasField("estimate_time"):
        console.print(f"  expected  {time_of(one.estimate_time)}  {', '.join(one.waiting_for)}")
    for missing in one.missing_information:
        console.print(f"  missing   {missing.field} {missing.source}  until {time_of(one.due_time)}")
    if one.HasField("decision"):
        console.print(f"  grade     {one.decision.grade}, PD {one.decision.pd:.2%}")
        for offer in one.decision.offers:
            console.print(
                f"  {offer.offer_id}   {yuan(offer.principal_fen)} over {offer.term_months} months at"
                f" {offer.apr_ppm / 1e4:.2f} % (all-in {offer.irr_ppm / 1e4:.2f} %),"
                f" {yuan(offer.instalment_fen)} a month"
            )
        if one.decision.degradations:
            console.print(f"  decided   {', '.join(one.decision.degradations)}")


def applications(console: Console, many: Iterable[pb.Application]) -> None:
    """One line each. Names are to be copied: a narrow terminal wraps the line, and nothing is ever cut."""
    rows = [("application", "state", "grade", "asked, CNY", "stored")]
    rows += [
        (a.name, state_of(a), a.decision.grade, f"{a.loan.amount_fen / 100:,.0f}", time_of(a.create_time)) for a in many
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), soft_wrap=True, markup=False)


def explanation(
    console: Console, answer: pb.ExplainDecisionResponse, every: bool = True, language: Language = "both"
) -> None:
    """Why, with the sources. In Chinese alone the frame is Chinese too."""

    def said(word: str) -> str:
        return ZH.get(word, word) if language == "zh" else word

    def told(zh: str, en: str, between: str) -> str:
        return escape({"zh": zh, "en": en, "both": f"{zh}{between}{en}"}[language])

    console.print(told(answer.summary_zh, answer.summary_en, "\n"))
    for reason in answer.decision.reasons if every else list(answer.decision.reasons)[:6]:
        law = f" [dim]{escape(reason.authority)}[/]" if reason.authority else ""
        weight = f" ({reason.contribution:+.2f})" if reason.kind == Reason.KIND_SCORE_FACTOR else ""
        text = told(reason.text_zh, reason.text_en, " | ")
        console.print(f"  {MARKS.get(reason.effect, ' ')} {text}{weight}{law}")
    for offer in answer.decision.offers:
        lines = " + ".join(f"{said(c.component)} {c.rate_ppm / 1e4:.2f} %" for c in offer.rate_components)
        console.print(f"  {offer.offer_id}: {offer.apr_ppm / 1e4:.2f} % = {lines}")
    if every:
        sources = ", ".join(
            f"{said(r.source)} {said(type(r).State.Name(r.state).removeprefix('STATE_').lower())}"
            for r in answer.profile.reports
        )
        console.print(f"  {said('evidence')}: {sources}")
        console.print(f"  {said('model')} {answer.score.model} ({answer.score.model_hash[:12]}),"
                      f" {said('policy')} {answer.pricing.policy} ({answer.pricing.policy_hash[:12]})")  # fmt: skip
    for schedule in answer.schedules:
        columns = (said(word) for word in ("payment", "principal", "interest", "balance"))
        table = Table(f"{schedule.offer_id} {said('month')}", *columns, box=None)
        for row in schedule.instalments:
            amounts = (row.payment_fen, row.principal_fen, row.interest_fen, row.balance_fen)
            table.add_row(str(row.number), *(f"{a / 100:,.2f}" for a in amounts))
        console.print(table)


def replay(console: Console, answer: pb.ReplayDecisionResponse) -> None:
    """Whether a decision came out the same, and what differs."""
    model, policy = (
        f"{answer.stored.model} ({answer.model_hash[:12]})",
        f"{answer.stored.policy} ({answer.policy_hash[:12]})",
    )
    if answer.same:
        console.print(f"[green]the same[/] to the last digit: grade {answer.stored.grade}, PD {answer.stored.pd:.4%}")
    else:
        console.print(f"[red]differs[/] in: {', '.join(answer.differences)}")
    console.print(f"  model {model}, policy {policy}")


def history(console: Console, answer: pb.ListEventsResponse) -> None:
    """What happened, oldest first, and whether the record is intact."""
    rows = [
        (time_of(e.event_time), e.kind, ", ".join(f"{k}={v}" for k, v in sorted(e.details.items()) if v), e.actor)
        for e in answer.events
    ]
    console.print(table("", ("when", "what", "details", "by"), rows))
    console.print("[green]record intact[/]" if answer.chain_intact else "[red]the record was changed[/]")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], *, words: int = 99) -> Table:
    """A small table. Where it is too wide for the terminal, cells wrap, and nothing is ever cut.

    words  how many columns hold words; those after them hold numbers, which stand to the right.
    """
    made = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made
