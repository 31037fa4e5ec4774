"""The parking RPCs: what is parked, and setting it going again. Proto in, store behind, proto out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lending.intake.v1 import parking_service_pb2 as pb
from lending.intake.v1.parking_service_pb2_grpc import ParkingServiceServicer

from loanmesh.runtime.caller import proven_path
from loanmesh.runtime.errors import CallerError
from loanmesh.runtime.status import item_status
from services.intake.application import ParkedView, State, require_allowed
from services.intake.ports import Records

SERVICE_NAME = "lending.intake.v1.ParkingService"


class ParkingServicer(ParkingServiceServicer):
    """Answers SREs from the store.

    changed  called with the ids of what was set going, for those who watch them.
    """

    def __init__(self, store: Records, changed: Callable[[Iterable[str]], None]) -> None:
        self._store = store
        self._changed = changed

    async def ListParkedApplications(
        self, request: pb.ListParkedApplicationsRequest, context: Any
    ) -> pb.ListParkedApplicationsResponse:
        """A page."""
        views, token = await self._store.parked(request.page_size or 100, request.page_token, request.cause)
        return pb.ListParkedApplicationsResponse(applications=map(_to_proto, views), next_page_token=token)

    async def ReleaseApplications(
        self, request: pb.ReleaseApplicationsRequest, context: Any
    ) -> pb.ReleaseApplicationsResponse:
        """Each for itself."""
        response = pb.ReleaseApplicationsResponse()
        for name in request.names:
            result = response.results.add(name=name)
            try:
                await self._release(name, request)
            except CallerError as error:
                result.error.CopyFrom(item_status(error))
        return response

    async def _release(self, name: str, request: pb.ReleaseApplicationsRequest) -> None:
        lender, application_id = name.split("/applications/")

        def apply(state: State, *_: object) -> dict[str, object]:
            require_allowed("release", application_id, state)
            return {"state": State.PENDING.value, "faults": 0, "waiting_for": "[]", "due_at": None, "not_before": 0.0}

        said = {"actor": request.actor, "reason": request.reason}
        # Who it says it is, and who it was by certificate or token. A repeat may come from another.
        details = {**said, "proven": path} if (path := proven_path()) else dict(said)
        await self._store.change(lender, application_id, request.request_id, said, "released", details, apply)
        self._changed([application_id])


def _to_proto(view: ParkedView) -> pb.ParkedApplication:
    details = view.details
    shown = pb.ParkedApplication(
        name=f"{view.lender}/applications/{view.id}",
        stage=details["stage"],
        cause=details["cause"],
        error_type=details["error_type"],
        faults=int(details["faults"]),
        trace_id=details["trace_id"],
    )
    for field, seconds in ((shown.park_time, view.parked_at), (shown.due_time, view.due_at)):
        field.FromNanoseconds(round(seconds * 1e6) * 1000)
    return shown
