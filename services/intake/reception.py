"""Counts what comes to the door and what is acknowledged, for the process's vitals, by priority."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from lending.intake.v1.intake_service_pb2 import Priority

from loanmesh.runtime.vitals import Vitals
from services.intake.application import New, Stored

Record = Callable[[float, Mapping[str, str]], None]
"""Records a figure, as seconds, with what it is recorded by."""
PRIORITIES: dict[int, str] = {number: name.removeprefix("PRIORITY_").lower() for name, number in Priority.items()}
"""Words for the classes, as metrics have them."""
BY_PRIORITY: dict[int, dict[str, str]] = {number: {"loanmesh.priority": name} for number, name in PRIORITIES.items()}


class Reception:
    """One replica's.

    record  takes how long a caller waited for the receipt, queue before the door included.
    """

    def __init__(self, vitals: Vitals, record: Record) -> None:
        self._vitals = vitals
        self._record = record

    def offered(self, priorities: Iterable[int]) -> None:
        """Applications of these classes came to the door; whether they are let in and stored is seen later."""
        for priority in priorities:
            if priority in PRIORITIES:
                self._vitals.offered[PRIORITIES[priority]] += 1

    def acknowledged(self, news: Sequence[New], stored: Sequence[Stored], took_s: float) -> None:
        """These, of one call, are on disk; one record a call, under its first one's priority."""
        for new, one in zip(news, stored, strict=True):
            if not one.existed:
                self._vitals.accepted[PRIORITIES[new.priority]] += 1
        if news:
            self._record(took_s, BY_PRIORITY[news[0].priority])
