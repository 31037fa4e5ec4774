"""Callers of a mesh under fire: they submit, read, accept, ask twice, and write down all they are told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from uuid import UUID

from google.protobuf import json_format
from lending.intake.v1 import intake_service_pb2 as pb

from lab.history import Recorder
from lab.population import Kind, Population
from loanmesh.client import CallFailed, Client, Decided, Overloaded, Submitted, Unreachable
from loanmesh.runtime.clock import Clock

SUBJECTS = 3000
"""Persons and firms that apply, again and again: the first time their sources are asked, later the cache answers."""
PATIENCE_S = 180.0
"""How long a caller bears with a mesh under fire: far longer than any fault."""
LOOK_EVERY_S = 0.02
AGAIN_ONE_IN = 50
ACCEPT_ONE_IN = 10


class Callers:
    """What all callers share: what to send, what was seen, what failed.

    count    how many applications are sent in all.
    allowed  how many may have been sent by now: faults and load keep step.
    """

    def __init__(
        self, addresses: Sequence[str], count: int, recorder: Recorder, clock: Clock, dice: random.Random,
        allowed: Callable[[], float],
    ) -> None:  # fmt: skip
        self._addresses = addresses
        self._count = count
        self._recorder = recorder
        self._clock = clock
        self._dice = dice
        self._allowed = allowed
        self._sent = 0
        self._told: list[str] = []
        self._done = False
        population, now = Population(), clock.now()
        kinds: tuple[Kind, Kind] = ("person", "firm")
        self._pool = [
            json_format.ParseDict(population.application(kinds[i % 2], i // 2, now), pb.Application())
            for i in range(min(SUBJECTS, count))
        ]
        self.acknowledged = 0
        self.failed: list[str] = []

    @property
    def sent(self) -> int:
        """Applications sent so far."""
        return self._sent

    async def run(self, many: int, single: int, readers: int) -> None:
        """Send all, with so many callers of each kind; returns when every one is answered for good."""
        reading = [asyncio.create_task(self._read(f"reader-{i}")) for i in range(readers)]
        try:
            async with asyncio.TaskGroup() as group:
                for i in range(many):
                    group.create_task(self._submit_many(f"many-{i}"))
                for i in range(single):
                    group.create_task(self._submit_singly(f"single-{i}"))
        finally:
            self._done = True
            await asyncio.gather(*reading)

    def _client(self, name: str) -> Client:
        address = self._addresses[sum(name.encode()) % len(self._addresses)]
        return Client(
            address, client_id=name, patience_s=PATIENCE_S, clock=self._clock, dice=random.Random(self._dice.random())
        )

    async def _next(self, client: str) -> tuple[str, pb.Application] | None:
        """The next to send, when it is time; None when all are sent."""
        while self._sent >= self._allowed() and self._sent < self._count:
            await self._clock.sleep(LOOK_EVERY_S)
        if self._sent >= self._count:
            return None
        self._sent += 1
        request_id = str(UUID(int=self._dice.getrandbits(128), version=4))
        self._recorder.submitted(client, request_id)
        return request_id, self._dice.choice(self._pool)

    def _acknowledged(self, client: str, request_id: str, application: pb.Application) -> None:
        self.acknowledged += 1
        self._told.append(application.name)
        # Answers to one caller overtake each other, so each is a reader of its own.
        self._recorder.acknowledged(client, request_id, application, reader=f"{client}/{request_id}")

    async def _submit_many(self, name: str) -> None:
        async def source() -> AsyncIterator[tuple[str, pb.Application]]:
            while item := await self._next(name):
                yield item

        async with self._client(name) as client:
            try:
                async with aclosing(client.submit_many(source())) as results:
                    async for result in results:
                        if isinstance(result, Submitted) and result.application is not None:
                            self._acknowledged(name, result.request_id, result.application)
                        elif not isinstance(result, Submitted):
                            self.failed.append(f"{name}: {result.error.code} {result.error}")
            except (CallFailed, Unreachable, Overloaded) as error:
                self.failed.append(f"{name}: submit_many: {type(error).__name__} {error}")

    async def _submit_singly(self, name: str) -> None:
        async with self._client(name) as client:
            while item := await self._next(name):
                try:
                    await self._one(client, name, *item)
                except (CallFailed, Unreachable, Overloaded) as error:
                    self.failed.append(f"{name}: {type(error).__name__} {error}")

    async def _one(self, client: Client, name: str, request_id: str, application: pb.Application) -> None:
        stored = await client.submit(application, request_id=request_id)
        self._acknowledged(name, request_id, stored)
        if self._dice.randrange(AGAIN_ONE_IN) == 0:
            again = await client.submit(application, request_id=request_id)
            self._recorder.acknowledged(name, request_id, again)
        if self._dice.randrange(ACCEPT_ONE_IN) == 0:
            seen = await client.submit_and_wait(application, request_id=request_id, deadline_s=PATIENCE_S)
            self._recorder.read(name, seen.application)
            if isinstance(seen, Decided) and seen.application.decision.offers:
                offer = seen.application.decision.offers[0].offer_id
                self._recorder.accept_asked(name, seen.application.name, offer)
                accepted = await client.accept(seen.application.name, offer)
                self._recorder.accepted(name, offer, accepted)

    async def _read(self, name: str) -> None:
        async with self._client(name) as client:
            while not self._done:
                if self._told:
                    try:
                        self._recorder.read(name, await client.get(self._dice.choice(self._told)))
                    except (CallFailed, Unreachable, Overloaded) as error:
                        self.failed.append(f"{name}: {type(error).__name__} {error}")
                await self._clock.sleep(LOOK_EVERY_S)
