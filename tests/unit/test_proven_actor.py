"""An order is recorded under whom its caller is proven to be, beside whom it names."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from lending.intake.v1 import erasure_service_pb2, parking_service_pb2
from lending.ops.v1 import ops_service_pb2
from lending.type.v1.party_pb2 import Identity
from structlog.testing import capture_logs

from lab.identity import resident_id
from loanmesh.runtime import caller
from loanmesh.runtime.caller import Caller
from services.intake.erasure import Eraser, Fate
from services.intake.erasure_servicer import ErasureServicer
from services.intake.parking_servicer import ParkingServicer
from services.intake.ports import Records
from tests.unit.test_ops import Process

NOBODY = None
ANN = Caller("operator/ann", "certificate")


@pytest.fixture(autouse=True)
def strangers_afterwards() -> Iterator[None]:
    yield
    caller.note(None)


class Events:
    """A store that keeps what is written into the history."""

    def __init__(self) -> None:
        self.details: list[dict[str, str]] = []

    async def change(self, *said: Any) -> None:
        self.details.append(said[5])


class Nothing:
    """Finds no application of anybody's."""

    async def erase(self, *_: object, **__: object) -> tuple[Sequence[Fate], bool, int]:
        return [], False, 0


@pytest.mark.parametrize(("who", "proven"), [(NOBODY, {}), (ANN, {"proven": "operator/ann"})])
async def test_a_release_is_written_with_both(who: Caller | None, proven: dict[str, str]) -> None:
    caller.note(who)
    events = Events()
    request = parking_service_pb2.ReleaseApplicationsRequest(
        names=["lenders/demo/applications/a"], request_id="release-0001", actor="li.na", reason="mended"
    )
    await ParkingServicer(cast(Records, events), lambda _: None).ReleaseApplications(request, None)
    assert events.details == [{"actor": "li.na", "reason": "mended", **proven}]


@pytest.mark.parametrize(("who", "proven"), [(NOBODY, ""), (ANN, "operator/ann")])
async def test_an_erasure_is_logged_with_both(who: Caller | None, proven: str) -> None:
    caller.note(who)
    number = resident_id(1, dt.date(1990, 1, 2))
    request = erasure_service_pb2.EraseSubjectRequest(
        parent="lenders/demo", identity=Identity(kind=Identity.KIND_RESIDENT_ID, value=number), actor="dpo"
    )
    with capture_logs() as logs:
        await ErasureServicer(cast(Eraser, Nothing())).EraseSubject(request, None)
    assert [(line["event"], line["actor"], line["proven"]) for line in logs] == [("subject_erased", "dpo", proven)]


async def test_an_override_is_logged_and_shown_with_both() -> None:
    caller.note(ANN)
    with capture_logs() as logs:
        shown = await Process().order("pause-0001", ops_service_pb2.OVERRIDE_FORCED_OPEN)
    assert shown.breaker_cause == "forced open by li.na (operator/ann): maintenance"
    assert [(line["actor"], line["proven"]) for line in logs if line["event"] == "dependency_overridden"] == [
        ("li.na", "operator/ann")
    ]
