"""The machine: which cores the mesh and the generator get, what a process has used, children that start and leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

STOP_WITHIN_S = 10.0


@dataclass(frozen=True)
class Cores:
    """Who runs where. Services share theirs; generator, sources and telemetry's receiver share the others."""

    services: frozenset[int]
    outside: frozenset[int]

    @property
    def apart(self) -> bool:
        """Whether the generator has a core to itself; if not, what we measure may be its limit."""
        return not self.services & self.outside


def share_out(cores: Iterable[int]) -> Cores:
    """The last core for the generator, all others for the services; one core is shared by all."""
    ordered = sorted(cores)
    if len(ordered) == 1:
        return Cores(frozenset(ordered), frozenset(ordered))
    return Cores(frozenset(ordered[:-1]), frozenset(ordered[-1:]))


def pin(pid: int, cores: frozenset[int]) -> None:
    """Keep a process on cores: each thread it has. Threads and children it makes later inherit their maker's."""
    with contextlib.suppress(FileNotFoundError):  # A process that has just ended.
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # A thread that has just ended.
                os.sched_setaffinity(int(task.name), cores)


def cpu_s(pid: int) -> float:
    """CPU that a process has used so far, seconds."""
    return _used_s(Path(f"/proc/{pid}/stat"))


def loop_cpu_s(pid: int) -> float:
    """CPU that its first thread, the one of the event loop, has used so far, seconds."""
    return _used_s(Path(f"/proc/{pid}/task/{pid}/stat"))


def _used_s(stat: Path) -> float:
    fields = stat.read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that run now."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


@contextlib.asynccontextmanager
async def child(
    *command: str,
    cores: frozenset[int],
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A Python child that prints one line when it is ready; yields it with that line, and ends it afterwards."""
    process = await asyncio.create_subprocess_exec(
        python, *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    try:
        assert process.stdout
        line = (await process.stdout.readline()).decode().strip()
        if not line:
            raise RuntimeError(f"{' '.join(command)} ended before it was ready")
        pin(process.pid, cores)
        yield process, line
    finally:
        await end(process)


@contextlib.asynccontextmanager
async def neighbours(count: int, cores: frozenset[int], within_s: float) -> AsyncIterator[None]:
    """So many processes that do nothing but use these cores, until left, or for so long at most, seconds; RuntimeError
    where that was not long enough."""
    work = f"import time\nends = time.monotonic() + {within_s}\nprint('ready', flush=True)\n"
    command = ("-c", f"{work}while time.monotonic() < ends: pass")
    async with contextlib.AsyncExitStack() as stack:
        started = [(await stack.enter_async_context(child(*command, cores=cores)))[0] for _ in range(count)]
        yield
        if any(process.returncode is not None for process in started):
            raise RuntimeError(f"neighbours ended before the work beside them, which took longer than {within_s:g} s")


async def end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, and SIGKILL for one that does not leave."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_WITHIN_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def output_of(*command: str, cores: frozenset[int], within_s: float, python: str = sys.executable) -> str:
    """What a Python child printed by its end. Raises RuntimeError when it fails or takes too long."""
    process = await asyncio.create_subprocess_exec(
        python, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    pin(process.pid, cores)
    try:
        async with asyncio.timeout(within_s):
            printed, errors = await process.communicate()
    except TimeoutError as error:
        raise RuntimeError(f"{' '.join(command)} took longer than {within_s:g} s") from error
    finally:
        await end(process)
    if process.returncode:
        last = errors.decode(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command)} failed: {' '.join(last)}")
    return printed.decode()
