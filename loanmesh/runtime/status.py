"""Our errors as gRPC statuses with details, and back. The one table between the two worlds."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from loanmesh.runtime import errors
from loanmesh.runtime.guard import Verdict

DOMAIN = "loanmesh"

_CODES: dict[type[errors.LoanmeshError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.RequestIdConflict: grpc.StatusCode.ALREADY_EXISTS,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MissingEvidence: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OverQuota: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DependencyDown: grpc.StatusCode.UNAVAILABLE,
}
_VERDICTS = {
    grpc.StatusCode.OK: Verdict.WELL,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Verdict.BUSY,
    **dict.fromkeys(
        (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.UNKNOWN,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.DATA_LOSS,
        ),
        Verdict.ILL,
    ),
}
_TOO_LARGE = ("larger than max", "metadata size exceeds")
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def status_code(error: errors.LoanmeshError) -> grpc.StatusCode:
    """The code that stands for the error."""
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The code of a status; UNKNOWN for a number that no code has."""
    return _BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN)


def verdict_of(code: grpc.StatusCode) -> Verdict:
    """What a call's end says of whom it went to. Codes that are the caller's doing say nothing."""
    return _VERDICTS.get(code, Verdict.NONE)


def is_too_large(code: grpc.StatusCode, text: str | None) -> bool:
    """Whether a call ended because gRPC itself found a message or its metadata too large: sent again, so is the next.

    It says RESOURCE_EXHAUSTED, as overload does, with no word but its text (a test reads it from a real server).
    """
    return code == grpc.StatusCode.RESOURCE_EXHAUSTED and any(words in (text or "") for words in _TOO_LARGE)


def item_status(error: errors.LoanmeshError) -> status_pb2.Status:
    """The error as a status with ErrorInfo, and BadRequest or RetryInfo where they apply."""
    status = status_pb2.Status(code=status_code(error).value[0], message=str(error))
    _pack(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if isinstance(error, errors.InvalidRequest):
        bad = error_details_pb2.BadRequest()
        for field, rule in error.violations:
            bad.field_violations.add(field=field, description=rule)
        _pack(status, bad)
    if isinstance(error, errors.NotNow):
        delay = Duration(seconds=int(error.retry_s), nanos=int(error.retry_s % 1 * 1e9))
        _pack(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def error_info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    """The ErrorInfo a status carries, if it carries one."""
    info = error_details_pb2.ErrorInfo()
    return next((info for detail in status.details if detail.Unpack(info)), None)


def _pack(
    status: status_pb2.Status,
    detail: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo,
) -> None:
    packed = Any()
    packed.Pack(detail)
    status.details.append(packed)
