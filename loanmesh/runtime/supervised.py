"""A process that `loanmesh up` started ends by itself when `up` is gone, however that came about."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

SUPERVISED = "LOANMESH_SUPERVISED"
"""Environment variable; 1 where stdin is a pipe whose other end the supervisor holds, and never writes to."""


def end_with_supervisor(stop: Callable[[], None]) -> None:
    """Call `stop` once when the supervisor is gone; nothing where there is none. Needs a running loop.

    A pipe, since the kernel closes it even after SIGKILL, on every platform; a process id may be somebody else's.
    """
    if os.environ.get(SUPERVISED) != "1":
        return
    loop = asyncio.get_running_loop()
    stdin = sys.stdin.fileno()

    def readable() -> None:
        if not os.read(stdin, 4096):
            loop.remove_reader(stdin)
            stop()

    loop.add_reader(stdin, readable)
