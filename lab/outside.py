"""A mesh started with the `loanmesh` command, seen and handled from outside: ready line, control socket, signals."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loanmesh.runtime.supervised import SUPERVISED

SERVICES = ("intake", "bureau", "scoring", "pricing")
STOP_WITHIN_S = 60.0


@dataclass(frozen=True)
class Replica:
    """One process of the mesh, as it is now; after a restart it has another pid."""

    service: str
    name: str
    address: str
    pid: int
    ready: bool

    def signal(self, number: signal.Signals) -> bool:
        """Send it a signal; whether it was still there."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
            return True
        return False


class Outside:
    """A running mesh.

    state        folder of its own; its path must be short enough for a socket.
    words        more words for `loanmesh up`.
    environment  settings of its services.
    """

    def __init__(self, state: Path, words: list[str], environment: Mapping[str, str]) -> None:
        self.state = state
        self.said: list[str] = []
        """What `up` told a person, line by line."""
        self._words = words
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, Any]:
        """Start it; its ready line. Raises RuntimeError with what it said when it does not come up."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "loanmesh", "up", "--json", "--state", str(self.state), *self._words,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment, SUPERVISED: "1"}, start_new_session=True,
        )  # fmt: skip
        assert self._process.stdout
        assert self._process.stderr
        self._listening = asyncio.create_task(self._listen(self._process.stderr))
        line = await self._process.stdout.readline()
        if not line:
            await self._listening
            raise RuntimeError("the mesh did not start: " + " ".join(self.said))
        ready: dict[str, Any] = json.loads(line)
        return ready

    async def _listen(self, stderr: asyncio.StreamReader) -> None:
        while line := await stderr.readline():
            self.said.append(line.decode(errors="replace").rstrip())

    async def ask(self, wanted: Mapping[str, int]) -> dict[str, Any]:
        """What runs, after scaling where numbers are given. Raises RuntimeError where that failed."""
        reader, writer = await asyncio.open_unix_connection(self.state / "control")
        writer.write(json.dumps(wanted).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await reader.readline())
        writer.close()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    async def replicas(self) -> list[Replica]:
        """All processes, the sandbox too."""
        found = (await self.ask({}))["replicas"]
        return [
            Replica(service, one["name"], one["address"], one["pid"], one["ready"])
            for service, all_ in found.items()
            for one in all_
        ]

    def crashes(self) -> list[str]:
        """Processes that ended by a signal which nobody sends, e.g. a segmentation fault."""
        ended = re.compile(r"(\S+) ended \((-?\d+)\)")
        found = [match for line in self.said if (match := ended.search(line))]
        meant = {-signal.SIGKILL, -signal.SIGTERM}
        return [match[0] for match in found if int(match[2]) < 0 and int(match[2]) not in meant]

    async def stop(self) -> None:
        """Ctrl-C, and wait for its end."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()  # Its parts watch their pipe, and end.
            await self._process.wait()
        if self._listening:
            await self._listening
