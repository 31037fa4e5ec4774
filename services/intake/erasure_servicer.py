"""The erasure RPC: proto in, eraser behind, proto out. Never says the number, nor whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from lending.intake.v1 import erasure_service_pb2 as pb
from lending.intake.v1.erasure_service_pb2_grpc import ErasureServiceServicer
from lending.type.v1.party_pb2 import Identity

from loanmesh.runtime.caller import proven_path
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.identity import valid_credit_code, valid_resident_id
from services.intake.erasure import AT_ONCE_MAX, Eraser, Fate

SERVICE_NAME = "lending.intake.v1.ErasureService"
_VALID = {
    Identity.KIND_RESIDENT_ID: valid_resident_id,
    Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE: valid_credit_code,
}
log = structlog.get_logger()


class ErasureServicer(ErasureServiceServicer):
    """Answers operators."""

    def __init__(self, eraser: Eraser) -> None:
        self._eraser = eraser

    async def EraseSubject(self, request: pb.EraseSubjectRequest, context: Any) -> pb.EraseSubjectResponse:
        """Erase, and say what became of each application."""
        if not _VALID[request.identity.kind](request.identity.value):
            raise InvalidRequest(("identity.value", "check character does not fit the number"))
        fates, more, answers = await self._eraser.erase(
            request.parent, request.identity.kind, request.identity.value, only_look=request.validate_only
        )
        erased = sum(fate.erased and not fate.before for fate in fates)
        if not request.validate_only:
            log.warning("subject_erased", lender=request.parent, actor=request.actor, proven=proven_path(),
                        applications=erased, kept=sum(not fate.erased for fate in fates), answers=answers)  # fmt: skip
        response = pb.EraseSubjectResponse(more=more, answers_erased=answers)
        for fate in told(fates):
            _add(response, request.parent, fate)
        return response


def told(fates: Sequence[Fate]) -> list[Fate]:
    """Those that fit into an answer, oldest first: before what is kept, what was erased, which is told only once."""
    first = sorted(range(len(fates)), key=lambda number: not fates[number].erased)[:AT_ONCE_MAX]
    return [fates[number] for number in sorted(first)]


def _add(response: pb.EraseSubjectResponse, lender: str, fate: Fate) -> None:
    shown = response.applications.add(name=f"{lender}/applications/{fate.id}")
    shown.outcome = pb.EraseSubjectResponse.OUTCOME_KEPT
    if fate.erased:
        shown.outcome = pb.EraseSubjectResponse.OUTCOME_ERASED
        if fate.before:
            shown.outcome = pb.EraseSubjectResponse.OUTCOME_ERASED_BEFORE
    if fate.keep:
        shown.rule, shown.because = fate.keep.rule, fate.keep.because
        if fate.keep.until is not None:
            shown.keep_until_time.FromSeconds(int(fate.keep.until))
