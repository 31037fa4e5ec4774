"""Sources over HTTP: the only module here that opens connections. Retries are tenacity's, and only here."""

from __future__ import annotations

import datetime as dt
from typing import Any

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from loanmesh.runtime.clock import Clock
from services.bureau.gather import Subject
from services.bureau.profile import Answer
from services.bureau.sources import Garbage, Source

ATTEMPTS = 2
"""One more try for a broken connection; a source that is down must not be asked more than twice for one look."""


class HttpWire:
    """Asks sources under one base address, POST /v1/{source}/query."""

    def __init__(self, base_url: str, clock: Clock, timeout_s: float) -> None:
        self._base_url = base_url.rstrip("/")
        self._clock = clock
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s), connector=aiohttp.TCPConnector(limit=0)
        )

    async def ask(self, source: Source, subject: Subject) -> Answer | str:
        """The answer, or `timeout`, `unavailable`, `refused` or `garbage`."""
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_random_exponential(multiplier=0.05, max=0.2),
                retry=retry_if_exception_type(aiohttp.ClientConnectionError),
                sleep=self._clock.sleep,
                reraise=True,
            ):
                with attempt:
                    return await self._once(source, subject)
        except TimeoutError:
            return "timeout"
        except (aiohttp.ClientPayloadError, aiohttp.ContentTypeError, Garbage, ValueError, TypeError, KeyError):
            return "garbage"
        except aiohttp.ClientError:
            return "unavailable"
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, source: Source, subject: Subject) -> Answer | str:
        body = {"kind": subject.identity_kind, "value": subject.number}
        async with self._session.post(f"{self._base_url}/v1/{source.id}/query", json=body) as response:
            if response.status >= 500:
                return "unavailable"
            if response.status not in (200, 404):
                return "refused"
            said: dict[str, Any] = await response.json()
        now_s = self._clock.now().timestamp()
        observed_at = dt.datetime.fromisoformat(said["observed_at"])
        if observed_at.tzinfo is None or observed_at.timestamp() > now_s + 300:
            raise Garbage(f"{source.id}: observed_at has no zone or lies in the future")
        found = response.status == 200
        facts = source.read(subject.kind, said["facts"]) if found else {}
        return Answer(found, facts, observed_at.timestamp(), now_s)

    async def close(self) -> None:
        """Close connections."""
        await self._session.close()
