"""Bureau's process: settings, parts, serve."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import random

import structlog
from lending.bureau.v1.bureau_service_pb2_grpc import add_BureauServiceServicer_to_server

from loanmesh.runtime.breaker import Breaker, BreakerSettings, Change
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.migrations import upgrade
from loanmesh.runtime.server import Service, run
from services.bureau.gather import Gatherer
from services.bureau.servicer import BureauServicer
from services.bureau.settings import BureauSettings
from services.bureau.sources import load_sources
from services.bureau.store import AnswerStore
from services.bureau.wire import HttpWire

PURGE_EVERY_S = 3600.0
log = structlog.get_logger()


async def build(settings: BureauSettings, clock: Clock) -> Service:
    """Put bureau together."""
    url = settings.database_url.get_secret_value()
    await asyncio.to_thread(upgrade, url, "services.bureau")
    database = await open_database(url)
    wire = HttpWire(settings.sources_url, clock, settings.gather.timeout_s)
    store = AnswerStore(database)
    sources = load_sources()
    key = settings.subject_key.get_secret_value().encode()
    gatherer = Gatherer(
        sources,
        wire,
        store,
        clock,
        lambda number: hmac.new(key, number.encode(), hashlib.sha256).hexdigest(),
        budget_s=settings.gather.budget_s,
        at_once_max=settings.gather.at_once_max,
        waiting_max=settings.gather.waiting_max,
        retry_s=settings.gather.retry_s,
        breakers={source: _breaker(source, settings.breaker, clock) for source in sources},
    )
    purging = asyncio.create_task(_purge(store, max(s.usable_for_s for s in sources.values()), clock))

    async def close() -> None:
        purging.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await purging
        await gatherer.close()
        await wire.close()
        await store.close()
        await database.close()

    service_names = ["lending.bureau.v1.BureauService"]
    return Service([(add_BureauServiceServicer_to_server, BureauServicer(gatherer))], service_names, close=close)


def _breaker(source: str, settings: BreakerSettings, clock: Clock) -> Breaker:
    def tell(change: Change) -> None:
        log.warning("breaker_changed", source=source, state=change.state.value, cause=change.cause)

    return Breaker(settings, clock, random.Random(), tell)


async def _purge(store: AnswerStore, keep_s: float, clock: Clock) -> None:
    while True:
        await store.purge(clock.now().timestamp() - keep_s)
        await clock.sleep(PURGE_EVERY_S)


def main() -> None:
    """Run bureau until SIGTERM."""
    run("bureau", BureauSettings, build)


if __name__ == "__main__":
    main()
