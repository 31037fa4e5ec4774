"""What the mesh tells of itself, read with the commands that an SRE has. The short version of `make causes`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from lab import causes
from lab.causes import GREEDY, TOO_MANY, Mesh, why_failed
from lab.drills import free_base
from lab.faults import HEALTHY, set_source
from loanmesh.runtime.clock import SystemClock

CLOCK = SystemClock()
TELLS_WITHIN_S = 15.0


async def run(*words: str) -> tuple[int, str]:
    return await asyncio.to_thread(_run, words)


def _run(words: tuple[str, ...]) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "loanmesh", *words], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


async def named(mesh: Mesh, since: float, kind: str) -> dict[str, object]:
    """The group of a kind of cause, as soon as `why-failed` tells of it first."""
    give_up = CLOCK.monotonic() + TELLS_WITHIN_S
    while True:
        groups = await why_failed(mesh, since)
        if groups and groups[0]["cause"]["kind"] == kind:
            return groups[0]
        assert CLOCK.monotonic() < give_up, f"{kind} is not named first, but {groups}"
        await CLOCK.sleep(0.3)


async def traced(application: str, state: str, *said: str) -> None:
    """`trace` tells all of these patterns, once every process has told its part: each does so once a second."""
    give_up = CLOCK.monotonic() + TELLS_WITHIN_S
    while True:
        code, text = await run("trace", application, "--state", state)
        if code == 0 and all(re.search(one, text) for one in said):
            return
        assert CLOCK.monotonic() < give_up, text
        await CLOCK.sleep(0.3)


async def test_a_trouble_is_found_with_one_command_and_followed_with_the_next(tmp_path: Path) -> None:
    async with causes.running(tmp_path, free_base(), False, CLOCK) as mesh:
        state = str(mesh.outside.state)
        began = CLOCK.now().timestamp()
        await set_source(mesh.world, "court", {"dead": True})
        async with mesh.client() as client:
            await mesh.submit(client, 10)
        group = await named(mesh, began, "source_down")
        assert group["cause"]["hop"] == "bureau -> court"  # type: ignore[index]  # JSON.

        await traced(
            str(group["example"]), state, "intake (Batch)?SubmitApplication", "process applications",
            "bureau ask court", "POST /v1/court/query", "source court is down",
        )  # fmt: skip
        _, text = await run("top", "--json", "--state", state)
        shown = json.loads(text)
        assert {row["service"] for row in shown["rows"]} == {"intake", "bureau", "scoring", "pricing"}
        assert [row["state"] for row in shown["rows"]] == ["up"] * 5
        await set_source(mesh.world, "court", HEALTHY)

        # The sink dies, and nobody notices: applications are stored and decided as before.
        with closing(sqlite3.connect(mesh.database)) as database:
            before = database.execute("SELECT count(*) FROM application").fetchone()[0]
        os.kill(int((await mesh.outside.ask({}))["sink"]["pid"]), signal.SIGKILL)
        async with mesh.client(patience_s=10) as client:
            assert len(await mesh.submit(client, 20)) == 20
        with closing(sqlite3.connect(mesh.database)) as database:
            assert database.execute("SELECT count(*) FROM application").fetchone()[0] == before + 20

        # It was started again, and tells of what comes, once nobody waits for court any more.
        with closing(sqlite3.connect(mesh.database)) as database:
            while database.execute("SELECT count(*) FROM application WHERE state = 'PENDING'").fetchone()[0]:
                await CLOCK.sleep(0.1)
        began = CLOCK.now().timestamp()
        async with mesh.client(GREEDY, patience_s=0.5) as client:
            await mesh.submit(client, TOO_MANY)
        await named(mesh, began, "budget_full")


async def test_commands_say_where_they_looked_and_what_to_do(tmp_path: Path) -> None:
    code, text = await run("trace", "0" * 32, "--state", str(tmp_path))
    assert (code, "loanmesh up" in text) == (3, True)
    assert (await run("trace", "no-such-thing", "--state", str(tmp_path)))[0] == 2
    assert (await run("why-failed", "--since", "yesterday", "--state", str(tmp_path)))[0] == 2
    code, text = await run("why-failed", "--jaeger", "http://127.0.0.1:1")
    assert (code, "--jaeger" in text) == (3, True)
