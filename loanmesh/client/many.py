"""Many applications at full speed: batches, several under way, results as they come, and never far ahead of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client.calls import AGAIN
from loanmesh.client.errors import CallFailed
from loanmesh.client.journal import Journal
from loanmesh.client.results import Refused, Submitted
from loanmesh.client.transport import Failure

BATCH_MAX = 500
"""Applications a batch, the contract's limit."""
BATCH_BYTES_MAX = 4 * 1024 * 1024
"""Half of what a service takes in one message (8 MiB), for applications that say a lot."""
Item = pb.Application | tuple[str, pb.Application]
Source = Iterable[Item] | AsyncIterable[Item]
Result = Submitted | Refused


class Job(NamedTuple):
    """One of many on its way: its place in the source, and what is sent for it."""

    position: int
    request: pb.SubmitApplicationRequest


class Batch:
    """What one BatchSubmitApplications asks for, over as many attempts as it takes: each answer for good is taken out
    of the request, so that only those are sent again that the mesh was too busy for."""

    def __init__(self, parent: str, jobs: Sequence[Job]) -> None:
        self._jobs = list(jobs)
        self.request = pb.BatchSubmitApplicationsRequest(parent=parent, requests=[job.request for job in jobs])
        self.results: list[Result] = []

    def check(self, answer: pb.BatchSubmitApplicationsResponse) -> Failure | None:
        """Take note of an answer; a Failure where some are to be sent again."""
        left: list[Job] = []
        failure: Failure | None = None
        for job, result in zip(self._jobs, answer.results, strict=True):
            if result.WhichOneof("outcome") == "application":
                found = result.application
                self.results.append(Submitted(job.position, job.request.request_id, found.name, found))
                continue
            refused = Failure.of(result.error)
            if refused.code in AGAIN:
                left.append(job)
                failure = refused
            else:
                self.results.append(Refused(job.position, job.request.request_id, refused.refusal()))
        if failure:
            failure.progress = len(left) < len(self._jobs)
            self._jobs = left
            del self.request.requests[:]
            self.request.requests.extend(job.request for job in left)
        return failure


Send = Callable[[Batch], Awaitable[None]]


class Submission:
    """One run of `submit_many`: takes items while there is room, hands out results as they come.

    parent    the lender.
    send      sends a batch until all of it is answered for good.
    new_id    makes request ids for items that have none.
    priority  for applications that state none.
    window    how many batches may be under way now.
    journal   remembers what is acknowledged; None: nobody does.
    """

    def __init__(
        self,
        parent: str,
        send: Send,
        new_id: Callable[[], str],
        priority: pb.Priority.ValueType,
        window: Callable[[], int],
        journal: Journal | None,
    ) -> None:
        self._parent = parent
        self._send = send
        self._new_id = new_id
        self._priority = priority
        self._window = window
        self._journal = journal
        self._positions = itertools.count()
        self.under_way: set[asyncio.Task[list[Result]]] = set()

    @property
    def room(self) -> int:
        """How many items may be added now; at most one batch."""
        return BATCH_MAX if len(self.under_way) < self._window() else 0

    async def add(self, items: Sequence[Item]) -> list[Result]:
        """Start with these; results of those that an earlier run got acknowledged come at once."""
        jobs = [self._job(item) for item in items]
        known = await self._journal.names([job.request.request_id for job in jobs]) if self._journal else {}
        results: list[Result] = []
        new: list[Job] = []
        for job in jobs:
            request_id = job.request.request_id
            if request_id in known:
                results.append(Submitted(job.position, request_id, known[request_id], None))
            else:
                new.append(job)
        for batch in _batches(new):
            self.under_way.add(asyncio.create_task(self._run(Batch(self._parent, batch))))
        return results

    def take(self) -> list[Result]:
        """Results that are there. Raises what stopped a batch: CallFailed, Unreachable or Overloaded."""
        done = [task for task in self.under_way if task.done()]
        good = [task for task in done if not task.cancelled() and task.exception() is None]
        if done and not good:
            done[0].result()
        # A failed one stays for the next look: what others brought is handed out first.
        self.under_way.difference_update(good)
        return [result for task in good for result in task.result()]

    async def stop(self) -> None:
        """Give up what is under way, and close the journal."""
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)
        if self._journal:
            await self._journal.close()

    def _job(self, item: Item) -> Job:
        request_id, application = item if isinstance(item, tuple) else ("", item)
        request = pb.SubmitApplicationRequest(application=application)
        request.application.priority = application.priority or self._priority
        if request_id:
            request.request_id = request_id
        else:
            request.request_id = self._journal.request_id(request.application) if self._journal else self._new_id()
        return Job(next(self._positions), request)

    async def _run(self, batch: Batch) -> list[Result]:
        try:
            await self._send(batch)
        except CallFailed as error:
            # One alone is at fault itself; with several, something is wrong with the run.
            if len(batch.request.requests) > 1:
                raise
            (job,) = batch._jobs
            batch.results.append(Refused(job.position, job.request.request_id, error))
        finally:
            # Also where the rest of the batch failed: what is acknowledged need not be sent again.
            if self._journal and (
                stored := [(r.request_id, r.name) for r in batch.results if isinstance(r, Submitted)]
            ):
                await self._journal.add(stored)
        return batch.results


async def run(submission: Submission, source: Source) -> AsyncGenerator[Result, None]:
    """Read the source as there is room, and yield results as they come. What the source raises is raised when all that
    it gave before is answered."""
    feed = _AsyncFeed(source) if isinstance(source, AsyncIterable) else _Feed(source)
    reading: asyncio.Task[list[Item]] | None = None
    ended: asyncio.Task[list[Item]] | None = None
    try:
        while True:
            if reading is None and not ended and submission.room:
                reading = asyncio.create_task(feed.some(submission.room))
            waiting: set[asyncio.Task[Any]] = submission.under_way | ({reading} if reading else set())
            if not waiting:
                if ended:
                    ended.result()
                return
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if reading and reading.done():
                read, reading = reading, None
                if read.exception() or not read.result():
                    ended = read
                else:
                    for result in await submission.add(read.result()):
                        yield result
            for result in submission.take():
                yield result
    finally:
        if reading:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        await feed.stop()
        await submission.stop()


class _Feed:
    """Items of a plain iterable."""

    def __init__(self, source: Iterable[Item]) -> None:
        self._source = iter(source)

    async def some(self, most: int) -> list[Item]:
        """The next ones; none: it has ended."""
        return list(itertools.islice(self._source, most))

    async def stop(self) -> None:
        """Nothing to do."""


class _End(NamedTuple):
    error: Exception | None


class _AsyncFeed(_Feed):
    """Items of an asynchronous one, as many as have come: a slow source must not hold up what it has given."""

    def __init__(self, source: AsyncIterable[Item]) -> None:
        self._read_ahead: asyncio.Queue[Item | _End] = asyncio.Queue(BATCH_MAX)
        self._reader = asyncio.create_task(self._read(source))

    async def some(self, most: int) -> list[Item]:
        """At least one, as soon as it is there; none: it has ended. Raises what the source raised."""
        items: list[Item] = []
        while len(items) < most and (not items or not self._read_ahead.empty()):
            item = await self._read_ahead.get()
            if isinstance(item, _End):
                self._read_ahead.put_nowait(item)  # For the next look.
                if item.error and not items:
                    raise item.error
                break
            items.append(item)
        return items

    async def stop(self) -> None:
        """Read no further."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self, source: AsyncIterable[Item]) -> None:
        try:
            async for item in source:
                await self._read_ahead.put(item)
            end = _End(None)
        except Exception as error:  # noqa: BLE001  Raised again to whoever takes the items.
            end = _End(error)
        await self._read_ahead.put(end)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    size = 0
    for job in jobs:
        bytes_ = job.request.ByteSize()
        if batch and (len(batch) == BATCH_MAX or size + bytes_ > BATCH_BYTES_MAX):
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += bytes_
    if batch:
        yield batch
