"""The client for code that is not asynchronous: the same methods, which block. Safe from several threads."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.rpc import status_pb2
from lending.intake.v1 import intake_service_pb2 as pb

from loanmesh.client import many
from loanmesh.client.client import Client
from loanmesh.client.results import Decided, Pending

T = TypeVar("T")


class SyncClient:
    """A `Client` on a thread of its own; takes the same arguments. Close it, or use it with `with`.

    Ctrl-C in a blocked caller cancels the call, down to the server, and is raised as usual.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self._started = threading.Event()
        self._failed: BaseException | None = None
        self._closing: asyncio.Event | None = None
        # A daemon, so that a program that ends without closing ends all the same.
        self._thread = threading.Thread(target=self._live, args=(address, options), name="loanmesh-client", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failed:
            self._thread.join()
            raise self._failed

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is under way, let go of the connections, end the thread. A second time changes nothing."""
        if self._thread.is_alive() and self._closing:
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    # --- Submit ---

    def submit(
        self,
        application: pb.Application,
        *,
        request_id: str | None = None,
        wait_s: float = 0.0,
        deadline_s: float | None = None,
    ) -> pb.Application:
        """See Client.submit."""
        return self._run(self._client.submit(application, request_id=request_id, wait_s=wait_s, deadline_s=deadline_s))

    def submit_and_wait(
        self, application: pb.Application, *, deadline_s: float = 10.0, request_id: str | None = None
    ) -> Decided | Pending:
        """See Client.submit_and_wait."""
        return self._run(self._client.submit_and_wait(application, deadline_s=deadline_s, request_id=request_id))

    def submit_many(
        self,
        applications: Iterable[many.Item],
        *,
        resume: Path | str | None = None,
        priority: pb.Priority.ValueType = pb.PRIORITY_BULK,
    ) -> Iterator[many.Result]:
        """See Client.submit_many. The iterable is read in the caller's thread."""
        items = iter(applications)
        submission = self._run(self._begin(resume, priority))
        ended = False
        try:
            while not ended or submission.under_way:
                some = list(itertools.islice(items, submission.room)) if not ended else []
                ended = ended or (submission.room > 0 and not some)
                yield from self._run(_step(submission, some, wait=ended or not submission.room))
        finally:
            self._run(submission.stop())

    def submit_batch(
        self, applications: Sequence[tuple[str, pb.Application]]
    ) -> list[pb.Application | status_pb2.Status]:
        """See Client.submit_batch."""
        return self._run(self._client.submit_batch(applications))

    # --- Read ---

    def get(self, name: str, *, deadline_s: float | None = None) -> pb.Application:
        """See Client.get."""
        return self._run(self._client.get(name, deadline_s=deadline_s))

    def list(
        self,
        *,
        filter: str = "",
        order_by: str = "",
        page_size: int = 0,
        page_token: str = "",
        deadline_s: float | None = None,
    ) -> pb.ListApplicationsResponse:
        """See Client.list."""
        return self._run(
            self._client.list(
                filter=filter, order_by=order_by, page_size=page_size, page_token=page_token, deadline_s=deadline_s
            )
        )

    def watch(self, name: str) -> Iterator[pb.Application]:
        """See Client.watch."""
        changes = self._client.watch(name)
        try:
            while (changed := self._run(_next(changes))) is not None:
                yield changed
        finally:
            self._run(_close(changes))

    def explain(
        self, name: str, *, schedules: bool = False, deadline_s: float | None = None
    ) -> pb.ExplainDecisionResponse:
        """See Client.explain."""
        return self._run(self._client.explain(name, schedules=schedules, deadline_s=deadline_s))

    def replay(self, name: str, *, deadline_s: float | None = None) -> pb.ReplayDecisionResponse:
        """See Client.replay."""
        return self._run(self._client.replay(name, deadline_s=deadline_s))

    def history(self, name: str, *, deadline_s: float | None = None) -> pb.ListEventsResponse:
        """See Client.history."""
        return self._run(self._client.history(name, deadline_s=deadline_s))

    # --- Change ---

    def accept(
        self, name: str, offer_id: str, *, request_id: str | None = None, deadline_s: float | None = None
    ) -> pb.Application:
        """See Client.accept."""
        return self._run(self._client.accept(name, offer_id, request_id=request_id, deadline_s=deadline_s))

    def withdraw(self, name: str, *, request_id: str | None = None, deadline_s: float | None = None) -> pb.Application:
        """See Client.withdraw."""
        return self._run(self._client.withdraw(name, request_id=request_id, deadline_s=deadline_s))

    def supply(self, request: pb.SupplyInformationRequest, *, deadline_s: float | None = None) -> pb.Application:
        """See Client.supply."""
        return self._run(self._client.supply(request, deadline_s=deadline_s))

    # --- Within ---

    def _live(self, address: str, options: dict[str, Any]) -> None:
        with asyncio.Runner() as runner:
            runner.run(self._serve(address, options))

    async def _serve(self, address: str, options: dict[str, Any]) -> None:
        try:
            self._client = Client(address, **options)
        except (TypeError, ValueError) as error:
            self._failed = error
            self._started.set()
            return
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._started.set()
        async with self._client:
            await self._closing.wait()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            work.close()
            raise RuntimeError("this client is closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Also for Ctrl-C, which ends only the waiting: without this the call would go on unseen.
            future.cancel()
            raise

    async def _begin(self, resume: Path | str | None, priority: pb.Priority.ValueType) -> many.Submission:
        return self._client._submission(resume, priority)


async def _step(submission: many.Submission, items: Sequence[many.Item], wait: bool) -> list[many.Result]:
    """Begin with these; what has come, and where asked, at least one batch of it."""
    results = await submission.add(items) if items else []
    if wait and submission.under_way:
        await asyncio.wait(submission.under_way, return_when=asyncio.FIRST_COMPLETED)
    return results + submission.take()


async def _next(changes: AsyncIterator[pb.Application]) -> pb.Application | None:
    return await anext(changes, None)


async def _close(changes: Any) -> None:
    await changes.aclose()
