"""The scoring RPCs, called with real messages."""

from __future__ import annotations

import datetime as dt
from typing import Any, cast

import pytest
from lending.bureau.v1.bureau_service_pb2 import Attribute, CreditProfile, SourceReport
from lending.scoring.v1 import scoring_service_pb2 as pb
from lending.type.v1.party_pb2 import Party
from lending.type.v1.reason_pb2 import Reason, Value

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import MissingEvidence
from loanmesh.runtime.status import code_of, error_info
from services.scoring.model import load_model
from services.scoring.servicer import ScoringServicer

CONTEXT = cast(Any, None)  # The servicer asks nothing of it.
OBSERVED_AT = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
FACTS = {
    "credit.revolving_utilisation": Value(number=0.95),
    "credit.overdue_30_59_count": Value(integer=2),
    "credit.overdue_60_89_count": Value(integer=0),
    "credit.overdue_90_count": Value(integer=1),
    "credit.debt_ratio": Value(number=0.4),
    "credit.open_lines": Value(integer=6),
    "credit.real_estate_loans": Value(integer=1),
}
FIRM_FACTS = {"tax.sales_12m_fen": Value(integer=5_000_000_00), "tax.customer_count": Value(integer=40)}


def a_servicer() -> ScoringServicer:
    models = {Party.KIND_PERSON: load_model("consumer-2026-11"), Party.KIND_FIRM: load_model("firm-2026-11")}
    return ScoringServicer(models, FakeClock())


def a_report(
    source: str = "central_bank",
    state: SourceReport.State.ValueType = SourceReport.STATE_FRESH,
    facts: dict[str, Value] | None = None,
) -> SourceReport:
    report = SourceReport(source=source, state=state)
    report.observed_time.FromDatetime(OBSERVED_AT)
    for name, value in (facts or {}).items():
        report.attributes.append(Attribute(name=name, value=value))
    return report


def an_item(
    *reports: SourceReport, key: str = "one", kind: Party.Kind.ValueType = Party.KIND_PERSON
) -> pb.ScoreProfilesRequest.Item:
    return pb.ScoreProfilesRequest.Item(key=key, party_kind=kind, profile=CreditProfile(reports=reports))


async def scored(*items: pb.ScoreProfilesRequest.Item) -> list[pb.ScoreProfilesResponse.Result]:
    return list((await a_servicer().ScoreProfiles(pb.ScoreProfilesRequest(items=items), CONTEXT)).results)


async def test_a_person_gets_a_score_with_facts_and_their_source() -> None:
    (result,) = await scored(an_item(a_report(facts=FACTS)))
    score = result.score
    assert 0 < score.pd < 1
    assert (score.model, len(score.model_hash)) == ("consumer-2026-11", 64)
    assert score.score_time.ToDatetime(dt.UTC) == FakeClock().now()
    assert all(factor.kind == Reason.KIND_SCORE_FACTOR for factor in score.factors)
    arrears = next(f for f in score.factors if f.code == "SCORE_OVERDUE_90_COUNT")
    assert arrears.effect == Reason.EFFECT_ADVERSE
    (fact,) = arrears.facts
    assert (fact.attribute, fact.value.integer, fact.source) == ("credit.overdue_90_count", 1, "central_bank")
    assert fact.observed_time.ToDatetime(dt.UTC) == OBSERVED_AT


@pytest.mark.parametrize("state", [SourceReport.STATE_MISSING, SourceReport.STATE_NO_CONSENT])
@pytest.mark.parametrize(("kind", "source"), [(Party.KIND_PERSON, "central_bank"), (Party.KIND_FIRM, "tax")])
async def test_without_its_source_a_profile_waits(
    state: SourceReport.State.ValueType, kind: Party.Kind.ValueType, source: str
) -> None:
    (result,) = await scored(an_item(a_report(source, state), kind=kind))
    assert result.WhichOneof("outcome") == "error"
    assert code_of(result.error).name == "FAILED_PRECONDITION"
    info = error_info(result.error)
    assert info is not None
    assert info.reason == MissingEvidence.reason
    assert info.metadata["sources"] == source


async def test_a_profile_without_any_report_waits_too() -> None:
    (result,) = await scored(an_item())
    assert result.WhichOneof("outcome") == "error"


@pytest.mark.parametrize("state", [SourceReport.STATE_STALE, SourceReport.STATE_NOT_FOUND])
async def test_stale_and_unknown_to_the_register_are_answers(state: SourceReport.State.ValueType) -> None:
    facts = FACTS if state == SourceReport.STATE_STALE else {}
    (result,) = await scored(an_item(a_report(state=state, facts=facts)))
    assert result.WhichOneof("outcome") == "score"


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("value", [Value(), Value(text="n/a"), Value(number=float("nan")), Value(number=float("inf"))])
async def test_no_odd_value_breaks_a_score(name: str, value: Value) -> None:
    (result,) = await scored(an_item(a_report(facts=FACTS | {name: value})))
    assert 0 < result.score.pd < 1


async def test_a_mixed_batch_of_64_answers_in_order_and_one_missing_source_hurts_no_other() -> None:
    items = []
    for number in range(64):
        match number % 4:
            case 0:
                report, kind = a_report("tax", facts=FIRM_FACTS), Party.KIND_FIRM
            case 1:
                report, kind = a_report(state=SourceReport.STATE_MISSING), Party.KIND_PERSON
            case _:
                report, kind = a_report(facts=FACTS), Party.KIND_PERSON
        items.append(an_item(report, key=f"item-{number}", kind=kind))
    results = await scored(*items)
    assert [r.key for r in results] == [f"item-{number}" for number in range(64)]
    assert [r.WhichOneof("outcome") for r in results] == ["score", "error", "score", "score"] * 16
    assert {r.score.model for r in results[0::4]} == {"firm-2026-11"}
    (alone,) = await scored(items[2])
    assert results[2].score.pd == pytest.approx(alone.score.pd, rel=1e-12)


async def test_the_same_request_gives_the_same_answer() -> None:
    item = an_item(a_report(facts=FACTS))
    assert await scored(item) == await scored(item)


async def test_models_come_with_their_cards_and_needs() -> None:
    listed = (await a_servicer().ListModels(pb.ListModelsRequest(), CONTEXT)).models
    assert [(m.model, list(m.required_sources)) for m in listed] == [
        ("consumer-2026-11", ["central_bank"]),
        ("firm-2026-11", ["tax"]),
    ]
    assert all("Must not be used for" in m.card for m in listed)
