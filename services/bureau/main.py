"""Bureau's process: settings, parts, serve."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import structlog
from lending.bureau.v1.bureau_service_pb2_grpc import add_BureauServiceServicer_to_server

from loanmesh.runtime.clock import Clock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.errors import NotNow
from loanmesh.runtime.guard import BulkheadSettings, make_guard
from loanmesh.runtime.keys import Keys
from loanmesh.runtime.lasting import Lasting
from loanmesh.runtime.migrations import prepare
from loanmesh.runtime.opening import opening
from loanmesh.runtime.sealed import Sealer
from loanmesh.runtime.server import Service, run
from loanmesh.runtime.setting_rules import WrongSetting, is_loopback
from loanmesh.runtime.settings import PrivacySettings
from loanmesh.runtime.token_file import TokenFile
from loanmesh.runtime.tracing import recorder
from loanmesh.runtime.vitals import Queue, SourceFigures, Vitals
from services.bureau import store as stored
from services.bureau.brownout import SERVE_CACHED, Brownout
from services.bureau.gather import Gatherer, Key
from services.bureau.keeping import FIRST, Keeping
from services.bureau.servicer import BureauServicer
from services.bureau.settings import BureauSettings
from services.bureau.sources import load_sources
from services.bureau.store import AnswerStore
from services.bureau.trail import Follower
from services.bureau.wire import HttpWire

PURGE_EVERY_S = 3600.0
CLOCKS_DIFFER_S = 300.0


async def build(settings: BureauSettings, clock: Clock) -> Service:
    """Put bureau together."""
    sources = load_sources()
    if unknown := set(settings.brownout.optional) - set(sources):
        raise WrongSetting(
            "BUREAU_BROWNOUT__OPTIONAL", f"no such source: {', '.join(sorted(unknown))}", ", ".join(sources)
        )
    proof = _proof(settings)
    keys = Keys.open("BUREAU_PRIVACY__KEYS_FILE", Path(settings.privacy.keys_file), clock)
    sealer = Sealer(keys)
    url = settings.database_url.get_secret_value()
    with opening("BUREAU_DATABASE_URL", url):
        await asyncio.to_thread(prepare, url, "services.bureau", settings.migrate)
        database = await open_database(url)
    if unknown := set(settings.query_fen) - set(sources):
        raise WrongSetting("BUREAU_QUERY_FEN", f"no such source: {', '.join(sorted(unknown))}", ", ".join(sources))
    figures = {name: SourceFigures(settings.query_fen.get(name, 0)) for name in sources}
    wire = HttpWire(settings.sources_url, clock, settings.gather.timeout_s, random.Random(), proof)
    store = AnswerStore(database, clock, sealer)
    bulkhead = BulkheadSettings(at_once_max=settings.gather.at_once_max, waiting_max=settings.gather.waiting_max)
    guards = {name: make_guard(name, "source", settings.breaker, bulkhead, clock, random.Random()) for name in sources}
    brownouts = {
        name: Brownout(guard, settings.brownout, settings.gather.budget_s, clock) for name, guard in guards.items()
    }
    gatherer = Gatherer(
        sources,
        wire,
        store,
        clock,
        sealer.subject,
        guards=guards,
        budget_s=settings.gather.budget_s,
        retry_s=settings.gather.retry_s,
        brownouts=brownouts,
        follow=Follower(told, clock) if (told := recorder()) else None,
        figures=figures,
    )
    vitals = Vitals(
        sources=figures,
        guards=list(guards.values()),
        queues=[Queue("cache_writes", lambda: store.waiting, stored.WAITING_MAX)],
        steps=sorted((s for b in brownouts.values() for s in b.steps), key=lambda s: s.name != SERVE_CACHED),
    )
    forever = [
        asyncio.create_task(_keep_private(store, Keeping(database, sealer), settings.privacy, clock)),
        asyncio.create_task(keys.look_forever()),
        asyncio.create_task(_purge(store, max(s.usable_for_s for s in sources.values()), clock)),
    ]

    async def close() -> None:
        for task in forever:
            task.cancel()
        await asyncio.wait(forever)
        await gatherer.close()
        await wire.close()
        await store.close()
        await database.close()

    return Service(
        [(add_BureauServiceServicer_to_server, BureauServicer(gatherer, store.erase))],
        ["lending.bureau.v1.BureauService"],
        close=close,
        vitals=vitals,
    )


def _proof(settings: BureauSettings) -> Callable[[], str] | None:
    """What proves us to the sources. Raises WrongSetting."""
    if not settings.sources_token_file:
        return None
    url = urlsplit(settings.sources_url)
    if url.scheme != "https" and not is_loopback(f"{url.hostname}:0"):
        raise WrongSetting("BUREAU_SOURCES_URL", "a token would go there unencrypted", "an https:// address")
    file = TokenFile(Path(settings.sources_token_file))
    try:
        file.token()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise WrongSetting("BUREAU_SOURCES_TOKEN_FILE", why, "a file with one token") from error
    return file.token


async def _purge(store: AnswerStore, keep_s: float, clock: Clock) -> None:
    lasting = Lasting("purge")
    while True:
        with lasting:
            await store.purge(clock.now().timestamp() - keep_s)
        await clock.sleep(PURGE_EVERY_S)


async def _keep_private(store: AnswerStore, keeping: Keeping, settings: PrivacySettings, clock: Clock) -> None:
    """Forget what other replicas erased, and seal anew what is under an older key.

    Side by side: a pass after a rotation may take hours, and the note of an erasure is kept for one.
    """
    await asyncio.gather(_forget_erased(store, settings.pass_every_s, clock), _reseal(keeping, settings, clock))


async def _forget_erased(store: AnswerStore, every_s: float, clock: Clock) -> None:
    """Forget what other replicas erased."""
    looked = clock.now().timestamp()
    lasting = Lasting("forget_erased")
    while True:
        await clock.sleep(every_s)
        with lasting:
            look = clock.now().timestamp()
            # A little further back than the last look: replicas' clocks differ.
            if await store.forget_erased(looked - CLOCKS_DIFFER_S):
                looked = look


async def _reseal(keeping: Keeping, settings: PrivacySettings, clock: Clock) -> None:
    """Seal anew what is under an older key, a tenth of the time at most."""
    lasting = Lasting("reseal")
    while True:
        await clock.sleep(settings.pass_every_s)
        with lasting:
            try:
                after: Key | None = FIRST
                while after:
                    started = clock.monotonic()
                    after, _ = await keeping.reseal(after, settings.pass_rows)
                    await clock.sleep(9 * max(0.001, clock.monotonic() - started))
            except NotNow as error:
                structlog.get_logger().warning("reseal_waits", error=str(error))


def main() -> None:
    """Run bureau until SIGTERM."""
    run("bureau", BureauSettings, build)


if __name__ == "__main__":
    main()
