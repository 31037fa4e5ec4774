"""Builders of promotions and of what replicas do, that show only what a test is about."""

from __future__ import annotations

import datetime as dt
from typing import Any

from loanmesh.promotion.capacity import SERVICES, Capacity, Cost
from loanmesh.promotion.file import Promotion

START = dt.datetime.fromisoformat("2026-12-12T20:00:00")


def a_promotion(*, usual: float = 1, peak: float = 100, length_s: float = 3600, **more: Any) -> Promotion:
    """One channel; two replicas of each service on a usual day; nothing limited."""
    said = {
        "name": "test",
        "timezone": "Asia/Shanghai",
        "start": START.isoformat(),
        "end": (START + dt.timedelta(seconds=length_s)).isoformat(),
        "channels": {"app": {"usual_a_second": usual, "peak_a_second": peak}},
        "decide_within_s": 60,
        "replicas": {name: {"usual": 2, "most": 50} for name in SERVICES},
    }
    return Promotion.model_validate({**said, **more})


def a_capacity(a_second: float = 1000) -> Capacity:
    """Every service does so many a second, cold or warm."""
    cost = Cost(cold=1000 / a_second, warm=1000 / a_second)
    return Capacity(measured_on=dt.date(2026, 1, 1), machine="a test", cpu_ms=dict.fromkeys(SERVICES, cost))
