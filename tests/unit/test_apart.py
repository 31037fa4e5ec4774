"""A batch whose items fail alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import structlog
from lending.scoring.v1 import scoring_service_pb2 as pb

from loanmesh.runtime.apart import each_apart
from loanmesh.runtime.errors import LoanmeshError, Overloaded
from loanmesh.runtime.status import item_status

ITEMS = [pb.ScoreProfilesRequest.Item(key=f"k{number}") for number in range(5)]


def refuse(item: pb.ScoreProfilesRequest.Item, error: LoanmeshError) -> pb.ScoreProfilesResponse:
    return pb.ScoreProfilesResponse(results=[pb.ScoreProfilesResponse.Result(key=item.key, error=item_status(error))])


class Answerer:
    """Scores what it can; breaks on the keys it is told to."""

    def __init__(self, *bad: str) -> None:
        self.bad = bad
        self.asked: list[int] = []

    async def __call__(self, items: Sequence[pb.ScoreProfilesRequest.Item]) -> pb.ScoreProfilesResponse:
        self.asked.append(len(items))
        if any(item.key in self.bad for item in items):
            raise KeyError("income of 110101199003070000")
        return pb.ScoreProfilesResponse(results=[pb.ScoreProfilesResponse.Result(key=item.key) for item in items])


async def test_one_item_that_breaks_costs_the_others_nothing_and_keeps_its_place() -> None:
    answer = Answerer("k1", "k4")
    with structlog.testing.capture_logs() as logs:
        results = (await each_apart(ITEMS, answer, refuse)).results
    assert [result.key for result in results] == ["k0", "k1", "k2", "k3", "k4"]
    assert [result.HasField("error") for result in results] == [False, True, False, False, True]
    assert answer.asked == [5, 1, 1, 1, 1, 1]
    assert [(line["key"], line["error_type"]) for line in logs] == [("k1", "KeyError"), ("k4", "KeyError")]
    # The text of an error may hold what was in the application.
    assert "1101" not in str(logs) + str(results)


async def test_a_batch_that_is_well_is_asked_once() -> None:
    answer = Answerer()
    assert len((await each_apart(ITEMS, answer, refuse)).results) == 5
    assert answer.asked == [5]


async def test_what_is_raised_on_purpose_passes_through() -> None:
    async def busy(items: Sequence[pb.ScoreProfilesRequest.Item]) -> pb.ScoreProfilesResponse:
        raise Overloaded("full")

    with pytest.raises(Overloaded):
        await each_apart(ITEMS, busy, refuse)
