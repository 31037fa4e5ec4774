"""The whole mesh on this machine: five processes, started in order, watched, started again when they die."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loanmesh.runtime.clock import Clock

DEFAULT_PORTS = {"intake": 7401, "bureau": 7402, "scoring": 7403, "pricing": 7404, "sandbox": 7405}
START_ORDER = ("sandbox", "bureau", "scoring", "pricing", "intake")
READY_WITHIN_S = 60.0
STOP_WITHIN_S = 15.0
RESTART_FIRST_S = 0.2
RESTART_MAX_S = 5.0


class CannotStart(Exception):
    """A part of the mesh does not start; the text says which and why."""


@dataclass
class Part:
    """One process of the mesh."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None
    address: str = ""
    restarts: int = 0


class Mesh:
    """Starts, watches and stops the parts.

    state  folder for databases, logs and the lock; a second mesh on the same state is refused.
    data   folder of the real data sets for the sandbox to play, or None.
    ports  port of each part.
    said   called with a line for a person whenever something happens.
    """

    def __init__(
        self, state: Path, data: Path | None, ports: Mapping[str, int], clock: Clock, said: Callable[[str], None]
    ) -> None:
        self._state = state
        self._clock = clock
        self._said = said
        self._stopping = False
        self._keepers: list[asyncio.Task[None]] = []
        self._lock: IO[str] | None = None
        self.parts = {name: self._part(name, data, ports) for name in START_ORDER}

    def _part(self, name: str, data: Path | None, ports: Mapping[str, int]) -> Part:
        at = {part: f"127.0.0.1:{port}" for part, port in ports.items()}
        if name == "sandbox":
            command = ["-m", "lab.sandbox", "--port", str(ports[name]), "--state", str(self._state / "sandbox")]
            return Part(name, command + (["--data", str(data)] if data else []), {})
        prefix = name.upper()
        ours = {f"{prefix}_SERVER__LISTEN": at[name]}
        if name in ("intake", "bureau"):
            ours[f"{prefix}_DATABASE_URL"] = f"sqlite:///{self._state / name}.db"
        if name == "intake":
            ours |= {f"INTAKE_{other.upper()}": at[other] for other in ("bureau", "scoring", "pricing")}
        if name == "bureau":
            ours["BUREAU_SOURCES_URL"] = f"http://{at['sandbox']}"
        # What the person set in the environment wins over what we would choose, except where we listen.
        return Part(name, ["-m", f"services.{name}.main"], {**ours, **_set_by_person(prefix, ours)})

    async def start(self) -> None:
        """Start all parts; raises CannotStart with the reason when one does not come up."""
        self._state.mkdir(parents=True, exist_ok=True)
        self._lock = (self._state / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CannotStart(
                f"another mesh runs on {self._state}; stop it, or choose another folder with --state"
            ) from error
        for name in START_ORDER:
            await self._launch(self.parts[name])
        self._keepers = [asyncio.create_task(self._keep(part)) for part in self.parts.values()]

    async def stop(self) -> None:
        """Stop all parts, intake first, so that nothing new comes in; kill what does not leave in time."""
        self._stopping = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for name in reversed(START_ORDER):
            await self._end(self.parts[name])
        if self._lock:
            self._lock.close()

    def kill(self, name: str) -> None:
        """SIGKILL one part; it is started again by itself."""
        process = self.parts[name].process
        if process and process.returncode is None:
            process.send_signal(signal.SIGKILL)

    def ready_line(self) -> dict[str, object]:
        """Addresses and pids, for machines."""
        return {
            "ready": "loanmesh",
            "state": str(self._state),
            "parts": {
                name: {"address": part.address, "pid": part.process.pid if part.process else None}
                for name, part in self.parts.items()
            },
        }

    async def _launch(self, part: Part) -> None:
        logs = self._state / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{part.name}.log"
        with log.open("ab") as stderr:
            before = stderr.tell()
            part.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *part.command,
                env={**os.environ, **part.environment},
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order.
            )
        assert part.process.stdout
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                line = await part.process.stdout.readline()
        except TimeoutError as error:
            raise CannotStart(f"{part.name} was not ready within {READY_WITHIN_S:g} s; see {log}") from error
        if not line:
            await part.process.wait()
            raise CannotStart(f"{part.name} ended at once: {last_words(log, before)}")
        part.address = str(json.loads(line)["address"])

    async def _keep(self, part: Part) -> None:
        wait_s = RESTART_FIRST_S
        while True:
            assert part.process
            started = self._clock.monotonic()
            code = await part.process.wait()
            if self._clock.monotonic() - started > 30:
                wait_s = RESTART_FIRST_S
            self._said(f"{part.name} ended ({code}); starting it again")
            while True:
                await self._clock.sleep(wait_s)
                wait_s = min(RESTART_MAX_S, wait_s * 2)
                part.restarts += 1
                try:
                    await self._launch(part)
                    self._said(f"{part.name} is back (pid {part.process.pid})")
                    break
                except CannotStart as error:
                    self._said(str(error))

    async def _end(self, part: Part) -> None:
        process = part.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await process.wait()
        except TimeoutError:
            self._said(f"{part.name} did not leave within {STOP_WITHIN_S:g} s; killed")
            process.kill()
            await process.wait()


def free_ports() -> dict[str, int]:
    """Ports that nobody listens on right now, for a mesh that must not meet another."""
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in DEFAULT_PORTS}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: int(one.getsockname()[1]) for name, one in sockets.items()}


def last_words(log: Path, before: int) -> str:
    """What a part said of why it ended: what it wrote for a person since byte `before`, else its last line."""
    said = [line for line in log.read_bytes()[before:].decode("utf-8", errors="replace").splitlines() if line]
    for_people = [line.removeprefix("settings: ") for line in said if line.startswith("settings: ")]
    return "; ".join(for_people or said[-1:]) or "without a word"


def ports_from(base: int) -> dict[str, int]:
    """Consecutive ports from `base`, in the usual order."""
    return {name: base + offset for offset, name in enumerate(DEFAULT_PORTS)}


def _set_by_person(prefix: str, ours: Mapping[str, str]) -> dict[str, str]:
    return {name: os.environ[name] for name in ours if name in os.environ and not name.endswith("LISTEN")}
