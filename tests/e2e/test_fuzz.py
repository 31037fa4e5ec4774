"""A hundred odd requests to every RPC of a real mesh; `make fuzz` sends ten thousand."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp
from lending.pricing.v1 import pricing_service_pb2 as pricing

from lab.fuzz import files, messages, rpc
from loanmesh.runtime.clock import FakeClock, SystemClock
from services.pricing.policy import load_policy
from services.pricing.servicer import PricingServicer


def test_odd_requests_break_leak_and_echo_nothing(tmp_path: Path) -> None:
    seed, told = int.from_bytes(os.urandom(4)), list[str]()
    rows = asyncio.run(rpc.run(tmp_path, seed, 100, "", SystemClock(), told.append))
    assert [row for row in rows if not row.met] == [], "\n".join([f"seed {seed}", *told])


def test_a_request_can_be_made_again_from_its_seed() -> None:
    sound = [pricing.PriceApplicationsRequest(items=files._items())]
    again = [messages.request(sound, random.Random("1:x:7")) for _ in range(2)]
    assert again[0] == again[1]
    assert len({messages.request(sound, random.Random(f"1:x:{number}")) for number in range(50)}) > 40


async def test_a_time_that_cannot_be_is_the_callers_mistake() -> None:
    (item, *_) = files._items()
    asked = pricing.PriceApplicationsRequest(items=[item])
    asked.items[0].as_of_time.CopyFrom(Timestamp(seconds=1_795_573_145, nanos=2**31 - 2))
    servicer = PricingServicer(load_policy("cn-demo-2026-11"), FakeClock())
    (result,) = (await servicer.PriceApplications(asked, None)).results  # type: ignore[arg-type]  # No context is read.
    assert result.error.code == 3
    assert "nanos" in result.error.message
