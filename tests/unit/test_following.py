"""What intake tells of an application's attempt: everything where it went wrong, nothing where all was well."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from lending.pricing.v1.pricing_service_pb2 import Pricing
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from loanmesh.runtime import semconv
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.tracing import Call, Place, Recorder, place_of
from services.intake.application import Claim, New
from services.intake.following import CROWD_A_SECOND, Following
from services.intake.ports import Broken, Case, Parked, Result, Unavailable
from tests.unit.test_pipeline import Fake, a_claim, a_pipeline

SUBMIT = "lending.intake.v1.IntakeService/SubmitApplication"
UNSAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


class Told:
    """A recorder, and what it was told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.recorder = Recorder(provider, self.clock, random.Random(1))
        self.reports: list[str] = []
        self.following = Following(
            self.recorder, self.clock, "intake-1-me", slow_s=2.0, lease_s=10.0,
            report=lambda event, **_: self.reports.append(event),
        )  # fmt: skip

    def spans(self, name: str = "") -> list[ReadableSpan]:
        return [s for s in self._exporter.get_finished_spans() if not name or s.name.endswith(name)]

    def in_trace(self, claim: Claim) -> dict[str, ReadableSpan]:
        at = place_of(claim.traceparent)
        assert at
        return {s.name.rpartition("/")[2]: s for s in self.spans() if s.context and s.context.trace_id == at.trace_id}

    async def decide(self, fake: Fake, *claims: Claim) -> Mapping[str, Result]:
        follow = self.following
        pipeline = a_pipeline(fake, self.clock)
        pipeline._bureau = follow.bureau(fake)
        pipeline._scoring, pipeline._pricing = follow.scoring(fake), follow.pricing(fake)
        pipeline._store = follow.store(fake)
        return await follow.decide(claims, pipeline.decide_batch)


def claim(told: Told, **changes: Any) -> Claim:
    made = a_claim(changes.pop("id_", "a1"))
    now = told.clock.now().timestamp()
    said: dict[str, Any] = {"traceparent": UNSAMPLED, "created_at": now, "not_before": now} | changes
    return dataclasses.replace(made, **said)


def a_new() -> New:
    return New("a", "lenders/demo", "shop", "r", b"", "h", 1, "app", 0.0)


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_healthy_application_that_is_not_sampled_leaves_no_span() -> None:
    told = Told()
    await told.decide(Fake(), claim(told))
    assert told.spans() == []


async def test_a_healthy_sampled_one_leaves_a_span_a_hop_and_no_more() -> None:
    told = Told()
    await told.decide(Fake(), claim(told, traceparent=UNSAMPLED[:-2] + "01"))
    names = [span.name.rpartition("/")[2] for span in told.spans()]
    # Its attempt, three hops, the commit; and the batch, in a trace of its own. The call itself was recorded as it was.
    assert sorted(names) == [
        "GatherProfiles", "PriceApplications", "ScoreProfiles", "process applications", "process applications",
        "settle applications",
    ]  # fmt: skip


async def test_a_deferred_one_is_told_from_the_call_that_brought_it_to_the_stage_that_failed() -> None:
    told = Told()
    down = Unavailable("scoring_unavailable", status="UNAVAILABLE", detail="Connection refused")
    one = claim(told)
    await told.decide(Fake(score=down), one)
    spans = told.in_trace(one)
    at = place_of(one.traceparent)
    assert at
    call, attempt, hop = spans["SubmitApplication"], spans["process applications"], spans["ScoreProfiles"]
    assert call.context
    assert call.context.span_id == at.span_id
    assert facts(call)[semconv.RECONSTRUCTED]  # Nobody here remembers the call, so that it was another replica's.
    assert attempt.parent
    assert attempt.parent.span_id == at.span_id
    assert attempt.context
    assert hop.parent
    assert hop.parent.span_id == attempt.context.span_id
    assert facts(attempt)[semconv.OUTCOME] == "deferred"
    assert facts(attempt)[semconv.APPLICATION_ID] == "a1"
    assert (hop.status.description, facts(hop)[semconv.CAUSE]) == ("UNAVAILABLE", "Connection refused")
    assert "PriceApplications" not in spans


async def test_the_call_that_brought_it_is_told_once_however_often_it_is_deferred() -> None:
    told = Told()
    first = claim(told)
    at = place_of(first.traceparent)
    assert at
    told.recorder.ended(Call(SUBMIT, "server", at, 0, 0.0, 0.01, "OK", {}, ""), keep=False)
    assert told.spans() == []
    down = Fake(score=Unavailable("scoring_unavailable"))
    await told.decide(down, first)
    await told.decide(down, dataclasses.replace(first, waiting_for='["scoring_unavailable"]', attempts=2))
    (call,) = told.spans("SubmitApplication")
    assert semconv.RECONSTRUCTED not in facts(call)
    assert len([s for s in told.spans("process applications") if semconv.APPLICATION_ID in facts(s)]) == 2


async def test_services_are_told_whom_to_follow_before_they_are_asked() -> None:
    seen: dict[str, list[str]] = {"gather": [], "score": []}

    class Watching(Fake):
        async def gather(self, cases: Sequence[Case]) -> Any:
            seen["gather"] += [case.traceparent for case in cases]
            return await super().gather(cases)

        async def score(self, cases: Sequence[Case]) -> Any:
            seen["score"] += [case.traceparent for case in cases]
            return await super().score(cases)

    told = Told()
    await told.decide(Watching(), claim(told), claim(told, id_="a2", waiting_for='["source_missing:tax"]'))
    (fresh, again), (nobody, again_scored) = seen["gather"], seen["score"]
    assert (fresh[-2:], again[-2:]) == ("00", "01")  # Bureau can find out by itself that the first is worth it.
    assert (nobody, again_scored[-2:]) == ("", "01")
    assert fresh[:36] == UNSAMPLED[:36]


async def test_an_attempt_that_died_with_its_replica_is_told_by_who_took_over() -> None:
    told = Told()
    end = told.clock.now().timestamp()
    told.clock.advance(1.0)
    one = claim(told, created_at=end - 5, not_before=end - 5, lost_lease=f"intake-9-gone@{end}")
    await told.decide(Fake(), one)
    lost = told.in_trace(one)["lost attempt"]
    assert (facts(lost)[semconv.OWNER], lost.status.description) == ("intake-9-gone", "lease_ended")
    assert lost.end_time == pytest.approx(end * 1e9)


@pytest.mark.parametrize(("priority", "late_s"), [(1, 2), (2, 4), (3, 20), (4, 60)])
async def test_what_can_wait_is_late_later(priority: int, late_s: float) -> None:
    told = Told()
    for age_s, spans in ((late_s - 0.5, 0), (late_s + 0.5, 1)):
        created_at = told.clock.now().timestamp() - age_s
        await told.decide(Fake(), claim(told, priority=priority, created_at=created_at, not_before=created_at))
        kept = [span for span in told.spans("process applications") if semconv.KEPT_FOR in facts(span)]
        assert len(kept) == spans


async def test_a_decision_that_comes_late_is_told_with_its_wait() -> None:
    told = Told()
    one = claim(told)
    told.clock.advance(3.0)
    await told.decide(Fake(), one)
    spans = told.in_trace(one)
    assert facts(spans["process applications"])[semconv.KEPT_FOR] == "late"
    wait = spans["wait for a turn"]
    assert wait.end_time and wait.start_time  # noqa: PT018
    assert (wait.end_time - wait.start_time) / 1e9 == pytest.approx(3.0)


async def test_a_degraded_decision_is_told() -> None:
    told = Told()
    one = claim(told)
    await told.decide(Fake(pricing=Pricing(outcome=Pricing.OUTCOME_APPROVED, degradations=["serve_cached:tax"])), one)
    attempt = told.in_trace(one)["process applications"]
    assert facts(attempt)[semconv.KEPT_FOR] == "degraded"
    assert facts(attempt)[semconv.DEGRADATIONS] == "serve_cached:tax"


async def test_a_store_that_cannot_commit_is_told_and_stays_the_callers_to_handle() -> None:
    class Full(Fake):
        async def settle(self, results: Sequence[Result]) -> set[str]:
            raise DependencyDown("the database cannot be written: disk is full")

    told = Told()
    one = claim(told)
    with pytest.raises(DependencyDown):
        await told.decide(Full(), one)
    spans = told.in_trace(one)
    assert spans["settle applications"].status.description == "DependencyDown"
    assert "disk is full" in facts(spans["process applications"])[semconv.CAUSE]


async def test_what_cannot_be_told_costs_no_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    told = Told()
    monkeypatch.setattr(told.recorder, "tell", broken)
    results = await told.decide(Fake(score=Unavailable("scoring_unavailable")), claim(told))
    assert set(results) == {"a1"}
    assert told.reports == ["not_traced"]


@pytest.mark.parametrize("order", ["kept first", "ended first"])
def test_a_call_that_is_wanted_is_told_once_whichever_came_first(order: str) -> None:
    told = Told()
    call = Call(SUBMIT, "server", Place(1, 2), 0, 0.0, 1.0, "OK", {}, "")
    steps: list[Callable[[], object]] = [
        lambda: told.recorder.keep(call.at),
        lambda: told.recorder.ended(call, keep=False),
    ]
    for step in steps if order == "kept first" else reversed(steps):
        step()
    told.recorder.keep(call.at)
    assert len(told.spans()) == 1


def test_a_commit_that_cannot_be_told_of_costs_no_receipt(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such span")

    monkeypatch.setattr(told.recorder, "tell", fail)
    began = told.clock.monotonic()
    told.clock.advance(0.7)
    told.following.stored([dataclasses.replace(a_new(), traceparent=UNSAMPLED)], began)
    assert told.reports == ["not_traced"]


def test_a_slow_commit_at_the_door_is_told_in_the_trace_of_each_it_held_up() -> None:
    told = Told()
    batch = [
        dataclasses.replace(a_new(), id=f"a{n}", traceparent=UNSAMPLED.replace("80319c", f"80319{n}")) for n in (1, 2)
    ]
    told.following.stored(batch, told.clock.monotonic())
    assert told.spans() == []
    began = told.clock.monotonic()
    told.clock.advance(0.7)
    told.following.stored(batch, began)
    held = told.spans("accept applications")
    assert [facts(span)[semconv.APPLICATION_ID] for span in held] == ["a1", "a2"]
    assert len({span.context.trace_id for span in held if span.context}) == 2


async def test_what_the_store_parks_since_it_cannot_be_read_is_told_in_its_trace() -> None:
    told = Told()
    one = claim(told)
    told.following.put_aside([Parked(one, "open", Broken("unsealable", "Unsealable"), 9.0, 1.0)])
    attempt = told.in_trace(one)["process applications"]
    assert facts(attempt)[semconv.OUTCOME] == "parked"
    assert facts(attempt)[semconv.STAGE] == "open"
    assert facts(attempt)[semconv.CAUSE] == "unsealable"


async def test_of_a_backlog_in_which_all_are_late_a_few_a_second_are_told_of() -> None:
    told = Told()
    at = told.clock.now().timestamp() - 60.0
    late = [claim(told, id_=f"a{n}", created_at=at, traceparent=f"00-{n:032x}-{n:016x}-00") for n in range(1, 801)]

    async def attempts_of(claims: Sequence[Claim], fake: Fake | None = None) -> int:
        before = len(told.spans("process applications"))
        await told.decide(fake or Fake(), *claims)
        return len(told.spans("process applications")) - before - 1  # And the batch, in a trace of its own.

    assert await attempts_of(late[:200]) == CROWD_A_SECOND
    told.clock.advance(0.5)
    assert await attempts_of(late[200:400]) == CROWD_A_SECOND / 2
    sampled = [dataclasses.replace(one, traceparent=one.traceparent[:-2] + "01") for one in late[400:600]]
    assert await attempts_of(sampled) == 200, "others tell their part of a sampled trace"
    assert await attempts_of(late[600:], Fake(score=Unavailable("scoring_unavailable"))) == 200, "they are not decided"
    assert await attempts_of(late[600:]) == 200, "nor is the end left out of what was told before"
