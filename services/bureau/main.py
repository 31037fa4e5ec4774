"""Bureau's process: settings, parts, serve."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

from lending.bureau.v1.bureau_service_pb2_grpc import add_BureauServiceServicer_to_server

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


async def build(settings: BureauSettings, clock: Clock) -> Service:
    """Put bureau together."""
    url = settings.database_url.get_secret_value()
    await asyncio.to_thread(upgrade, url, "services.bureau")
    database = await open_database(url)
    wire = HttpWire(settings.sources_url, clock, settings.gather.timeout_s)
    key = settings.subject_key.get_secret_value().encode()
    gatherer = Gatherer(
        load_sources(),
        wire,
        AnswerStore(database),
        clock,
        lambda number: hmac.new(key, number.encode(), hashlib.sha256).hexdigest(),
        budget_s=settings.gather.budget_s,
        at_once_max=settings.gather.at_once_max,
        waiting_max=settings.gather.waiting_max,
        retry_s=settings.gather.retry_s,
    )

    async def close() -> None:
        await wire.close()
        await database.close()

    service_names = ["lending.bureau.v1.BureauService"]
    return Service([(add_BureauServiceServicer_to_server, BureauServicer(gatherer))], service_names, close=close)


def main() -> None:
    """Run bureau until SIGTERM."""
    run("bureau", BureauSettings, build)


if __name__ == "__main__":
    main()
