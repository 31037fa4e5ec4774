"""`loanmesh trace`: what happened to one application, call by call, in every service that took part."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from loanmesh.cli.answer import NEXT, Json, complaints, person, print_json
from loanmesh.cli.codes import FAILED, UNREACHABLE, USAGE
from loanmesh.cli.folder import State, chosen
from loanmesh.runtime import semconv
from loanmesh.seeing.causes import Cause, cause_in, decided_in
from loanmesh.seeing.spans import CannotRead, Log, Span, Traces
from loanmesh.seeing.tree import Node, hang_logs, plant, walk

BAR = 24
"""Width of the time bar, characters."""
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_APPLICATION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SHOWN = (
    semconv.ATTEMPT, semconv.OWNER, semconv.OUTCOME, semconv.WAITING_FOR, semconv.DEGRADATIONS, semconv.HTTP_STATUS,
    semconv.SOURCE_STATE, semconv.REASON, semconv.CAUSE, semconv.EXCEPTION_TYPE, semconv.KEPT_FOR,
    semconv.MESSAGING_BATCH_COUNT,
)  # fmt: skip
"""Attributes that are worth a place on a span's line."""

Jaeger = Annotated[
    str, typer.Option(envvar="LOANMESH_JAEGER", help="Jaeger's query address, http://HOST:16686; else `up`'s traces.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(trace)


def trace(
    name: Annotated[str, typer.Argument(help="lenders/NAME/applications/ID, the ID alone, or a trace id.")],
    state: State = Path(),
    jaeger: Jaeger = "",
    json_: Json = False,
) -> None:
    """Show what happened to one application: every attempt, call, source and line that was logged meanwhile.

    Kept for each application that failed, was retried, deferred, degraded, turned away or late; of the others for one
    in twenty. Example: `loanmesh trace lenders/demo/applications/0192...`
    """
    complain = complaints()
    key = name.rstrip("/").rpartition("/")[2].lower()
    if not (_TRACE_ID.fullmatch(key) or _APPLICATION_ID.fullmatch(key)):
        complain.print(f"[red]NAME[/] must be an application's name or id, or a trace id of 32 digits, not {name!r}")
        raise typer.Exit(USAGE)
    try:
        spans, logs = asyncio.run(_read(traces_at(state, jaeger), key))
    except CannotRead as error:
        complain.print(f"[red]not reachable[/]: {error}")
        raise typer.Exit(UNREACHABLE) from error
    if not spans:
        complain.print(
            f"[yellow]no trace of {key}[/]: nothing was wrong with it and it is not among the one in twenty that are"
            f" kept all the same, or it is too old, or not a second old. `loanmesh history NAME` shows its events"
        )
        raise typer.Exit(FAILED)
    cause = cause_in(spans, {})
    roots = plant(spans)
    beside = hang_logs(roots, logs)
    if json_:
        print_json(as_json(roots, beside, cause))
    else:
        console = person()
        for line in waterfall(roots, beside, cause, name):
            console.print(line, soft_wrap=True)


def traces_at(state: Path, jaeger: str) -> Traces:
    """Where to read: a Jaeger where one is named, else what `up` keeps."""
    if jaeger:
        from loanmesh.seeing.jaeger import JaegerTraces

        return JaegerTraces(jaeger)
    from loanmesh.seeing.store import FILE, KeptTraces

    return KeptTraces(chosen(state) / FILE)


async def _read(traces: Traces, key: str) -> tuple[list[Span], list[Log]]:
    spans = await (traces.of_trace(key) if _TRACE_ID.fullmatch(key) else traces.of_application(key))
    if not _TRACE_ID.fullmatch(key):
        # A batch of a caller is one trace: only this application's part of it, and what belongs to all.
        spans = [span for span in spans if span.application in ("", key)]
    if not spans:
        return [], []
    logs: dict[Log, None] = {}
    for trace_id in dict.fromkeys(span.trace_id for span in spans):
        inside = [span for span in spans if span.trace_id == trace_id]
        began, ended = min(s.began for s in inside), max(s.ended for s in inside)
        for line in await traces.logs(trace_id, began, ended):
            if line.attributes.get("application_id", key) == key:
                logs.setdefault(_hashable(line))
    return spans, list(logs)


def _hashable(line: Log) -> Log:
    return Log(line.at, line.trace_id, line.service, line.instance, line.level, line.event, _Facts(line.attributes))


class _Facts(dict[str, Any]):
    """Attributes that can be a key: the same line may belong to two traces."""

    def __hash__(self) -> int:  # type: ignore[override]  # Never changed once made.
        return hash(tuple(sorted(self.items(), key=str)))


def waterfall(roots: Sequence[Node], beside: Sequence[Log], cause: Cause | None, name: str) -> Iterator[Text]:
    """The trace for a person, line by line."""
    nodes = list(walk(roots))
    began = min(node.span.began for node in nodes)
    ended = max(node.span.ended for node in nodes)
    yield Text.assemble(
        (name, "bold"), f"  {len(nodes)} spans over {_duration(ended - began)}, from {_clock(began)}",
        f"  trace {nodes[0].span.trace_id}",
    )  # fmt: skip
    for node in nodes:
        yield _line(node, began, max(ended - began, 1e-6))
        for event in node.span.events:
            yield Text(f"{'':>{BAR + 22}}{'  ' * node.depth}  * {event.name} {_facts(event.attributes)}", "yellow")
        for line in node.logs:
            yield _log(line, began, node.depth)
    if beside:
        yield Text("logged elsewhere at that time", "bold")
        for line in beside:
            yield _log(line, began, 0)
    end = decided_in([node.span for node in nodes]) if _APPLICATION_ID.search(name) else None
    outcome = end.text(semconv.OUTCOME) if end else ""
    if cause:
        yield Text.assemble(("cause  ", "bold"), (cause.what, "red"), f"  ({cause.hop}, {cause.status})")
    else:
        yield Text("nothing was wrong", "green")
    if end and cause:
        yield Text.assemble(("over   ", "bold"), (f"{outcome} at {_clock(end.ended)}", "green"))
    if end or not cause:
        yield Text(
            f"{NEXT}`loanmesh history {name}` shows its events"
            if _APPLICATION_ID.search(name)
            else f"{NEXT}`loanmesh why-failed` says what else went wrong"
        )
    else:
        yield Text(f"{NEXT}`{cause.then.replace('EXAMPLE', name)}`")


def as_json(roots: Sequence[Node], beside: Sequence[Log], cause: Cause | None) -> dict[str, Any]:
    """The same for machines: spans in reading order, each with its depth and lines."""
    return {
        "spans": [{**asdict(n.span), "depth": n.depth, "logs": [asdict(line) for line in n.logs]} for n in walk(roots)],
        "logs": [asdict(line) for line in beside],
        "cause": asdict(cause) if cause else None,
    }


def _line(node: Node, began: float, whole_s: float) -> Text:
    span = node.span
    left = min(BAR - 1, int(BAR * (span.began - began) / whole_s))
    width = max(1, min(BAR - left, round(BAR * span.took_s / whole_s)))
    colour = "red" if span.error else "green"
    name = span.name.rpartition("/")[2] if span.attributes.get(semconv.RPC_METHOD) else span.name
    line = Text.assemble(
        f"{_duration(span.began - began):>9} ", (" " * left + "━" * width + " " * (BAR - left - width), colour),
        f" {_duration(span.took_s):>9}  {'  ' * node.depth}", (span.service, "bold"), f" {name}",
    )  # fmt: skip
    if span.kind == "client" and semconv.RPC_METHOD in span.attributes:
        line.append(" (call)")
    if span.error:
        line.append(f"  ✗ {span.error}", "red")
    said = {k.removeprefix("loanmesh."): v for k, v in span.attributes.items() if k in _SHOWN and v not in ("", 1)}
    if said:
        line.append(f"  {_facts(said)}", "dim")
    return line


def _log(line: Log, began: float, depth: int) -> Text:
    style = "yellow" if line.level in ("warning", "error", "critical") else "dim"
    facts = {k: v for k, v in line.attributes.items() if k not in ("trace_id", "application_id")}
    return Text(
        f"{_duration(line.at - began):>9} {'':{BAR + 12}}{'  ' * depth}| {line.service} {line.level}: {line.event}"
        f" {_facts(facts)}",
        style,
    )


def _facts(facts: Any) -> str:
    return ", ".join(f"{key}={value}" for key, value in facts.items() if value != "")


def _duration(seconds: float) -> str:
    if abs(seconds) < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.2f} s" if abs(seconds) < 120 else f"{seconds / 60:.1f} min"


def _clock(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
