"""An intake whose clock is wrong, on both databases: it judges by the database's, and refuses nobody for its own."""

from __future__ import annotations

import datetime as dt
from typing import Any, cast

import pytest
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.runtime.clock import FakeClock, SystemClock
from loanmesh.runtime.database import Database
from loanmesh.runtime.errors import DependencyDown, InvalidRequest
from loanmesh.runtime.witness import WitnessedClock
from services.intake.privacy import Privacy
from services.intake.servicer import IntakeServicer
from services.intake.store import Store
from tests.builders import a_sealer, an_application


def an_intake(database: Database, off_s: float) -> tuple[IntakeServicer, WitnessedClock]:
    """Whose clock is off by so many seconds."""
    own = FakeClock(SystemClock().now() + dt.timedelta(seconds=off_s))
    store = Store(database, own, "a", 30.0, Privacy(a_sealer()))
    clock = WitnessedClock(own, store.now, lambda _: None)
    nobody = cast(Any, None)
    servicer = IntakeServicer(
        store, nobody, nobody, nobody, nobody, nobody, {}, clock, lambda: "id", accepts_waiting_max=1,
        admission=nobody, is_sure=lambda: clock.is_sure,
    )  # fmt: skip
    return servicer, clock


def a_request(given_in_s: float = 0.0) -> pb.SubmitApplicationRequest:
    """With consents given so many seconds from now."""
    request = pb.SubmitApplicationRequest(request_id="request-1", application=an_application())
    for consent in request.application.consents:
        consent.given_time.FromDatetime(SystemClock().now() + dt.timedelta(seconds=given_in_s))
        consent.ClearField("expire_time")
    return request


@pytest.mark.parametrize("off_s", [-86_400.0, -4000.0, 0.0, 4000.0])
async def test_a_consent_given_just_now_is_taken_whatever_our_own_clock_says(database: Database, off_s: float) -> None:
    servicer, clock = an_intake(database, off_s)
    await clock.look()
    new = servicer._new("lenders/demo", a_request(), "shop", "")
    assert abs(new.created_at - SystemClock().now().timestamp()) < 60


@pytest.mark.parametrize("off_s", [0.0, 4000.0])
async def test_a_consent_from_the_future_is_refused_whatever_our_own_clock_says(
    database: Database, off_s: float
) -> None:
    servicer, clock = an_intake(database, off_s)
    await clock.look()
    with pytest.raises(InvalidRequest, match="must not lie in the future"):
        servicer._new("lenders/demo", a_request(given_in_s=3600), "shop", "")


async def test_nobody_is_refused_before_the_clock_is_confirmed(database: Database) -> None:
    servicer, _ = an_intake(database, -4000.0)
    with pytest.raises(DependencyDown):
        servicer._new("lenders/demo", a_request(), "shop", "")
