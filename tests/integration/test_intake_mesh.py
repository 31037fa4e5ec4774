"""Intake's way to a service over a real channel: what a failing, a busy and a recovered service make of a batch."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest

from loanmesh.runtime.breaker import BreakerSettings, State
from loanmesh.runtime.channel import open_channel
from loanmesh.runtime.errors import InvalidRequest, Overloaded
from loanmesh.runtime.guard import BulkheadSettings, Guard, make_guard
from loanmesh.runtime.settings import ServerSettings
from services.intake.application import Claim
from services.intake.mesh import GrpcScoring
from services.intake.ports import Broken, Case, Unavailable
from services.intake.settings import Downstream
from tests.builders import a_profile, an_application
from tests.integration.servers import CLOCK, PLAIN, Behaviour, Server, failing, servers

CLAIM = Claim("id", "lenders/demo", 1, 1, 1, 1, "", b"", "[]", 1.7e9)
APPLICATION = an_application()
CASES = [Case(CLAIM, APPLICATION, APPLICATION.parties[0], profile=a_profile("person", 1)) for _ in range(3)]


@asynccontextmanager
async def scoring(
    does: Behaviour | None, settings: ServerSettings | None = None
) -> AsyncIterator[tuple[Server, GrpcScoring, Guard]]:
    breaker = BreakerSettings(**{**Downstream().breaker.model_dump(), "open_s": 0.3, "half_open_permits": 1})
    guard = make_guard("scoring", "service", breaker, BulkheadSettings(), CLOCK, random.Random(1))
    async with (
        servers(1, settings) as (server,),
        open_channel(server.address, CLOCK, lambda _: 5.0, service="bureau", tls=PLAIN) as channel,
    ):
        server.scoring.does = does
        yield server, GrpcScoring(channel, guard), guard


async def ask(port: GrpcScoring) -> Unavailable:
    """What all cases of a batch are told, which is the same."""
    answers: Sequence[Any] = await port.score(CASES)
    assert len(answers) == len(CASES)
    assert len(set(answers)) == 1
    assert isinstance(answers[0], Unavailable)
    return answers[0]


async def test_a_failing_service_is_left_alone_and_cases_are_told_when_to_come_back() -> None:
    async with scoring(failing(grpc.StatusCode.INTERNAL)) as (server, port, guard):
        for _ in range(6):
            assert (await ask(port)).cause == "scoring_unavailable"
        asked = server.scoring.calls
        told = await ask(port)
        assert told.cause == "scoring_breaker_open"
        assert told.retry_s
        assert 0 < told.retry_s < 0.5
        assert server.scoring.calls == asked  # Nothing was sent.
        assert guard.breaker.state is State.OPEN

        server.scoring.does = None
        while isinstance((await port.score(CASES))[0], Unavailable):
            await CLOCK.sleep(0.02)
        assert guard.breaker.state.value == "closed"


async def test_a_busy_service_is_no_failure_but_too_much_at_once() -> None:
    async def busy(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        raise Overloaded("full", retry_s=0.7)

    async with scoring(busy) as (server, port, guard):
        for _ in range(20):
            assert await ask(port) == Unavailable("scoring_overloaded", overloaded=True, status="RESOURCE_EXHAUSTED")
        assert (guard.breaker.state, guard.overloads, server.scoring.calls) == (State.CLOSED, 20, 20)


async def test_one_that_breaks_its_batch_does_not_hold_up_those_beside_it() -> None:
    async def refuses_the_poisoned(context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if any("poison" in item.key for item in server.scoring.asked.items):
            raise InvalidRequest(("items", "cannot be read"))

    cases = [
        Case(replace(CLAIM, id=id_), APPLICATION, APPLICATION.parties[0], CASES[0].profile)
        for id_ in ("a", "poison", "c", "d")
    ]
    async with scoring(refuses_the_poisoned) as (server, port, guard):
        told = await port.score(cases)
        assert [isinstance(one, Broken) for one in told] == [False, True, False, False]
        assert guard.breaker.state is State.CLOSED


async def test_an_answer_for_too_few_cases_is_a_fault() -> None:
    async with scoring(None) as (server, port, guard):
        server.scoring.answers_max = 2
        assert (await ask(port)).cause == "scoring_error"
        assert guard.failures == 1


async def test_answers_in_another_order_are_nobodys() -> None:
    cases = [replace(case, claim=replace(CLAIM, id=f"id-{number}")) for number, case in enumerate(CASES)]
    async with scoring(None) as (server, port, guard):
        server.scoring.mixes_up = True
        assert await port.score(cases) == [Unavailable("scoring_error")] * 3
        assert guard.failures == 1


@pytest.mark.parametrize("status", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION])
async def test_our_own_mistakes_open_no_breaker(status: grpc.StatusCode) -> None:
    async with scoring(failing(status)) as (_, port, guard):
        for _ in range(20):
            await port.score(CASES)
        assert (guard.breaker.state, guard.failures) == (State.CLOSED, 0)


async def test_a_service_nobody_listens_for_opens_it_too() -> None:
    async with scoring(failing(grpc.StatusCode.INTERNAL)) as (server, port, _):
        await server.server.stop(0)
        for _ in range(6):
            assert (await ask(port)).cause == "scoring_unavailable"
        assert (await ask(port)).cause == "scoring_breaker_open"
