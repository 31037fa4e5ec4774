"""Sources over HTTP: what to ask, and what each way of failing is called. Retries are tenacity's, and only here."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import json
import random
from collections.abc import Callable

import aiohttp
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt

from loanmesh.runtime.clock import Clock
from services.bureau.gather import Subject
from services.bureau.http import Http
from services.bureau.profile import Answer
from services.bureau.sources import Garbage, Source
from services.bureau.trail import Trail, Try, current

ATTEMPTS = 2
RETRY_WITHIN_S = 0.05
"""How long at most before the one more try for a broken connection or a 5xx: at random, so that many do not come as
one. A source that is down must not be asked more than twice a look."""
BODY_BYTES_MAX = 65_536
"""Longest answer read. Every attribute of the dictionary at its longest fits ten times."""
FUTURE_S_MAX = 300.0
"""How far ahead a source's clock may run."""
log = structlog.get_logger()


class _Down(Exception):
    """The source answered 5xx."""


class HttpWire:
    """Asks sources under one base address, POST /v1/{source}/query.

    timeout_s  for one query with its retry and the waits between.
    token      see Http.
    """

    def __init__(
        self,
        base_url: str,
        clock: Clock,
        timeout_s: float,
        dice: random.Random,
        token: Callable[[], str] | None = None,
    ) -> None:
        self._http = Http(base_url, clock, token)
        self._clock = clock
        self._timeout_s = timeout_s
        self._dice = dice
        # All of one length: none is a part of another.
        self._marks = (f"{dice.getrandbits(64):016x}{number:016x}" for number in itertools.count())

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        """The answer, or `timeout`, `unavailable`, `overloaded` (429), `refused` (other 4xx) or `garbage`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._retrying(source, subject)
        except TimeoutError:
            return "timeout"
        except Garbage as error:
            log.warning("source_garbage", source=source.id, error=str(error))
            return "garbage"
        except (aiohttp.ClientPayloadError, ValueError, TypeError, KeyError, RecursionError):
            return "garbage"
        except (aiohttp.ClientError, _Down):
            return "unavailable"

    async def _retrying(self, source: Source, subject: Subject) -> Answer | str:
        try:
            return await self._noted(source, subject)
        except (aiohttp.ClientConnectionError, _Down) as error:
            failed = error
        # Only from here on, since to begin with it costs more than a query that goes well.
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=lambda _: self._dice.uniform(0, RETRY_WITHIN_S),
            retry=retry_if_exception_type((aiohttp.ClientConnectionError, _Down)),
            sleep=self._clock.sleep,
            reraise=True,
        ):
            with attempt:
                if attempt.retry_state.attempt_number == 1:
                    raise failed
                return await self._noted(source, subject)
        raise AssertionError("the last attempt returns or raises")

    async def _noted(self, source: Source, subject: Subject) -> Answer | str:
        """One try, with a note of how it went on the query's trail."""
        trail = current.get() or Trail(source.id, 0.0)
        began, error, trail.status = self._clock.monotonic(), "", 0
        try:
            return await self._once(source, subject)
        except BaseException as raised:
            error = type(raised).__name__.lstrip("_")
            raise
        finally:
            trail.tries.append(Try(began, self._clock.monotonic(), trail.status, error))

    async def _once(self, source: Source, subject: Subject) -> Answer | str:
        mark = next(self._marks)
        asked = json.dumps({"kind": subject.identity_kind, "value": subject.number, "query": mark}).encode()
        path = f"/v1/{source.id}/query"
        status, answer, sure = await self._http.post(path, asked, mark.encode(), BODY_BYTES_MAX)
        if trail := current.get():
            trail.status = status
        if status >= 500:
            raise _Down
        if status == 429:
            return "overloaded"
        if status not in (200, 404):
            return "refused"
        if answer is None:
            raise Garbage(f"{source.id}: the answer is longer than {BODY_BYTES_MAX} bytes")
        if not sure:
            # May be about somebody else. What is kept may be no better; the next try has a connection of its own.
            self._http.close()
            raise aiohttp.ClientConnectionError("the answer does not say which query it is to")
        said = json.loads(answer)
        now_s = self._clock.now().timestamp()
        observed_at = dt.datetime.fromisoformat(said["observed_at"])
        if observed_at.tzinfo is None or not 0 < observed_at.timestamp() <= now_s + FUTURE_S_MAX:
            raise Garbage(f"{source.id}: observed_at has no zone, or lies in the future or before 1970")
        if said.get("query", mark) != mark:
            raise Garbage(f"{source.id}: the answer is to another query")
        # A 404 counts as `does not know the subject` only in the source's own words: a proxy's 404 is garbage.
        found = status == 200
        facts = source.read(subject.kind, said["facts"]) if found else {}
        return Answer(found, facts, observed_at.timestamp(), now_s)

    async def close(self) -> None:
        """Close connections."""
        self._http.close()
