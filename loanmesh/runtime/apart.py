"""A batch whose items fail alone: what one of them breaks must not cost the others their answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import structlog
from google.protobuf.message import Message

from loanmesh.runtime.errors import LoanmeshError

A = TypeVar("A", bound=Message)
log = structlog.get_logger()


async def each_apart(
    items: Sequence[Any], answer: Callable[[Sequence[Any]], Awaitable[A]], refuse: Callable[[Any, LoanmeshError], A]
) -> A:
    """The answer to all items at once where that works, else made up of the answers to each by itself, in order.

    items   have a `key`.
    refuse  answers for one item with an error. What we raise on purpose (a LoanmeshError) passes through.
    """
    try:
        return await answer(items)
    except LoanmeshError:
        raise
    except Exception as error:  # noqa: BLE001  A fault of ours in one item must not cost the others their answer.
        if len(items) == 1:
            return refuse(items[0], fault(items[0].key, error))
    first, *others = await asyncio.gather(*(each_apart([item], answer, refuse) for item in items))
    for other in others:
        first.MergeFrom(other)
    return first


def fault(key: str, error: Exception) -> LoanmeshError:
    """Log that we failed on an item, and what to answer for it."""
    # The type only: the text of an error may hold what was in the application.
    log.error("item_fault", key=key, error_type=type(error).__name__)
    return LoanmeshError("this service failed on this application", error_type=type(error).__name__)
