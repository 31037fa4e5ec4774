"""Where a service's CPU goes, function by function: off, unless LOANMESH_PROFILE names a folder.

Only the event loop's thread is seen, and only its CPU, not its waiting. Functions written in C count as one; seeing
every call makes Python functions look dearer than they are: read shares, not times.
"""

from __future__ import annotations

import cProfile
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "LOANMESH_PROFILE"


@contextmanager
def profiled(service: str) -> Iterator[None]:
    """Profile what the thread does within; writes FOLDER/SERVICE-PID.prof, as the standard library's pstats reads it.

    To be used from first readiness to SIGTERM, so that starting and stopping are not in it.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        yield
        return
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        Path(folder).mkdir(parents=True, exist_ok=True)
        profile.dump_stats(Path(folder) / f"{service}-{os.getpid()}.prof")
