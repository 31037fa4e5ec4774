"""The contract's own rules (protovalidate), as (field, rule) pairs in the caller's terms."""

from __future__ import annotations

import protovalidate
from google.protobuf.message import Message

from loanmesh.runtime.errors import InvalidRequest


def refusal(message: Message) -> InvalidRequest | None:
    """What is wrong with a message, as the error to answer with; None where it is well formed."""
    found = violations(message)
    return InvalidRequest(*found) if found else None


def violations(message: Message) -> list[tuple[str, str]]:
    """Every broken rule, as (path of the field, rule in words); empty where the message is well formed."""
    return [
        (_path(violation), violation.proto.message or violation.proto.rule_id)
        for violation in protovalidate.collect_violations(message)
    ]


def _path(violation: protovalidate.Violation) -> str:
    parts = []
    for element in violation.proto.field.elements if violation.proto.field else ():
        subscript = getattr(element, "subscript", None)
        index = "" if subscript is None else f"[{getattr(subscript, 'value', subscript)}]"
        parts.append(f"{element.field_name}{index}")
    return ".".join(parts)
