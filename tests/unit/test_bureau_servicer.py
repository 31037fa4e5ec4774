"""Bureau's RPC: an identity that cannot be fails its item alone, and is not quoted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
from lending.bureau.v1.bureau_service_pb2 import CreditProfile, GatherProfilesRequest
from lending.type.v1.party_pb2 import Identity, Party

from lab.population import Kind
from loanmesh.runtime.status import code_of, error_info
from services.bureau.gather import Gatherer
from services.bureau.servicer import BureauServicer
from tests.builders import an_application


class EmptyProfiles:
    """A gatherer that knows nothing, and counts whom it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def gather(self, items: Sequence[GatherProfilesRequest.Item]) -> list[CreditProfile]:
        self.asked += [item.key for item in items]
        return [CreditProfile() for _ in items]


def an_item(key: str, kind: Kind = "firm", identity: dict[str, Any] | None = None) -> GatherProfilesRequest.Item:
    party = an_application(kind, 1).parties[0]
    party.identity.MergeFrom(Identity(**(identity or {})))
    return GatherProfilesRequest.Item(key=key, lender="lenders/demo", party=party)


@pytest.mark.parametrize(
    ("kind", "identity", "field"),
    [
        ("person", {"value": "990000199001010000"}, "party.identity.value"),
        ("person", {"kind": Identity.KIND_UNIFIED_SOCIAL_CREDIT_CODE}, "party.identity.kind"),
        ("firm", {"value": "919900000000000000"}, "party.identity.value"),
        ("firm", {"kind": Identity.KIND_RESIDENT_ID}, "party.identity.kind"),
    ],
)
async def test_an_impossible_identity_fails_alone(kind: Kind, identity: dict[str, Any], field: str) -> None:
    gatherer = EmptyProfiles()
    wrong = an_item("b", kind, identity)
    request = GatherProfilesRequest(items=[an_item("a", "person"), wrong, an_item("c")])
    answer = await BureauServicer(cast(Gatherer, gatherer), cast(Any, None)).GatherProfiles(request, cast(Any, None))
    assert [(r.key, r.WhichOneof("outcome")) for r in answer.results] == [
        ("a", "profile"), ("b", "error"), ("c", "profile"),
    ]  # fmt: skip
    error = answer.results[1].error
    assert gatherer.asked == ["a", "c"]
    assert code_of(error).name == "INVALID_ARGUMENT"
    assert getattr(error_info(error), "reason", "") == "INVALID_REQUEST"
    assert field in error.message
    assert wrong.party.identity.value not in str(error)


def test_every_kind_of_party_is_checked() -> None:
    from services.bureau.servicer import _CHECKS

    assert set(_CHECKS) == set(Party.Kind.values()) - {Party.KIND_UNSPECIFIED}
