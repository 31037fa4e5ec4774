"""The bureau RPC: proto in, profiles out."""

from __future__ import annotations

from typing import Any

import grpc
from lending.bureau.v1 import bureau_service_pb2 as pb
from lending.bureau.v1.bureau_service_pb2_grpc import BureauServiceServicer

from services.bureau.gather import Gatherer

_Context = grpc.aio.ServicerContext[Any, Any]


class BureauServicer(BureauServiceServicer):
    """Gathers batches."""

    def __init__(self, gatherer: Gatherer) -> None:
        self._gatherer = gatherer

    async def GatherProfiles(self, request: pb.GatherProfilesRequest, context: _Context) -> pb.GatherProfilesResponse:
        """One profile an item."""
        profiles = await self._gatherer.gather(request.items)
        return pb.GatherProfilesResponse(
            results=[
                pb.GatherProfilesResponse.Result(key=item.key, profile=profile)
                for item, profile in zip(request.items, profiles, strict=True)
            ]
        )
