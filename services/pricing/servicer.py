"""The pricing RPCs: proto in, policy in the middle, proto out."""

from __future__ import annotations

import datetime as dt
from typing import Any

import grpc
from lending.pricing.v1 import pricing_service_pb2 as pb
from lending.pricing.v1.pricing_service_pb2_grpc import PricingServiceServicer
from lending.type.v1 import offer_pb2

from loanmesh.runtime.apart import fault
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.status import item_status
from loanmesh.runtime.validation import refusal
from services.pricing.decide import price
from services.pricing.policy import Policy
from services.pricing.schedule import schedule

_Context = grpc.aio.ServicerContext[Any, Any]


class PricingServicer(PricingServiceServicer):
    """Prices batches under one version of policy."""

    def __init__(self, policy: Policy, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock

    async def PriceApplications(
        self, request: pb.PriceApplicationsRequest, context: _Context
    ) -> pb.PriceApplicationsResponse:
        """One pricing an item, or why there is none."""
        now = self._clock.now()
        response = pb.PriceApplicationsResponse()
        for item in request.items:
            result = response.results.add(key=item.key)
            if refused := refusal(item):
                result.error.CopyFrom(item_status(refused))
                continue
            try:
                result.pricing.CopyFrom(price(item, self._policy, _as_of(item, now)))
            except InvalidRequest as error:
                result.error.CopyFrom(item_status(error))
            except Exception as error:  # noqa: BLE001  A fault of ours in one item must not cost the others their answer.
                result.error.CopyFrom(item_status(fault(item.key, error)))
        return response

    async def ScheduleRepayments(
        self, request: pb.ScheduleRepaymentsRequest, context: _Context
    ) -> pb.ScheduleRepaymentsResponse:
        """Schedules, row by row."""
        response = pb.ScheduleRepaymentsResponse()
        for item in request.items:
            rows = response.schedules.add().instalments
            for row in schedule(item.principal_fen, item.apr_ppm, item.term_months):
                rows.append(
                    offer_pb2.Instalment(
                        number=row.number,
                        payment_fen=row.payment_fen,
                        principal_fen=row.principal_fen,
                        interest_fen=row.interest_fen,
                        balance_fen=row.balance_fen,
                    )
                )
        return response


def _as_of(item: pb.PriceApplicationsRequest.Item, now: dt.datetime) -> dt.datetime:
    """As of when to price. Raises InvalidRequest."""
    if not item.HasField("as_of_time"):
        return now
    try:
        return item.as_of_time.ToDatetime(dt.UTC)
    except ValueError as error:
        raise InvalidRequest(("as_of_time", "must have nanos from 0 to 999,999,999")) from error
