"""The bureau RPC: proto in, profiles out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from lending.bureau.v1 import bureau_service_pb2 as pb
from lending.bureau.v1.bureau_service_pb2_grpc import BureauServiceServicer
from lending.type.v1.party_pb2 import Identity, Party

from loanmesh.runtime.apart import each_apart
from loanmesh.runtime.errors import InvalidRequest, LoanmeshError
from loanmesh.runtime.identity import valid_credit_code, valid_resident_id
from loanmesh.runtime.status import item_status
from loanmesh.runtime.validation import refusal
from services.bureau.gather import Gatherer

_Context = grpc.aio.ServicerContext[Any, Any]
_Result = pb.GatherProfilesResponse.Result
_CHECKS = {
    Party.KIND_PERSON: (Identity.KIND_RESIDENT_ID, valid_resident_id),
    Party.KIND_FIRM: (Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE, valid_credit_code),
}


class Forget(Protocol):
    """Deletes what is cached of (lender, identity number); how many answers. Raises DependencyDown."""

    async def __call__(self, lender: str, number: str, *, only_count: bool) -> int: ...


class BureauServicer(BureauServiceServicer):
    """Gathers batches."""

    def __init__(self, gatherer: Gatherer, forget: Forget) -> None:
        self._gatherer = gatherer
        self._forget = forget

    async def GatherProfiles(self, request: pb.GatherProfilesRequest, context: _Context) -> pb.GatherProfilesResponse:
        """One profile an item; an identity that cannot be fails its item alone."""
        return await each_apart(request.items, self._gather, _refused)

    async def EraseSubject(self, request: pb.EraseSubjectRequest, context: _Context) -> pb.EraseSubjectResponse:
        """Forget what is cached of a subject."""
        erased = await self._forget(request.lender, request.identity.value, only_count=request.validate_only)
        return pb.EraseSubjectResponse(answers_erased=erased)

    async def _gather(self, items: Sequence[pb.GatherProfilesRequest.Item]) -> pb.GatherProfilesResponse:
        errors = [refusal(item) or _error(item.party) for item in items]
        sound = [item for item, error in zip(items, errors, strict=True) if error is None]
        profiles = iter(await self._gatherer.gather(sound))
        response = pb.GatherProfilesResponse()
        for item, error in zip(items, errors, strict=True):
            result = response.results.add(key=item.key)
            if error is None:
                result.profile.CopyFrom(next(profiles))
            else:
                result.error.CopyFrom(item_status(error))
        return response


def _refused(item: pb.GatherProfilesRequest.Item, error: LoanmeshError) -> pb.GatherProfilesResponse:
    return pb.GatherProfilesResponse(results=[_Result(key=item.key, error=item_status(error))])


def _error(party: Party) -> InvalidRequest | None:
    # The texts never quote the number: it is personal data.
    identity_kind, is_valid = _CHECKS[party.kind]
    if party.identity.kind != identity_kind:
        rule = f"must be {Identity.Kind.Name(identity_kind)} for a {Party.Kind.Name(party.kind)}"
        return InvalidRequest(("party.identity.kind", rule))
    if not is_valid(party.identity.value):
        return InvalidRequest(("party.identity.value", "is no such number: its date or check character is wrong"))
    return None
