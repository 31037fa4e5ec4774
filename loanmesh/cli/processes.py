"""Which processes a command means where none is named: those of the mesh that `up` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loanmesh.cli import control
from loanmesh.cli.mesh import DEFAULT_PORTS, SERVICES


async def replicas(state: Path) -> list[str]:
    """Addresses of every replica of every service; the default ports where no `up` runs on `state`."""
    try:
        running = (await control.ask(state, {}))["replicas"]
    except control.NoMesh:
        return [f"127.0.0.1:{DEFAULT_PORTS[name]}" for name in SERVICES]
    return [str(one["address"]) for name in SERVICES for one in running[name]]


async def sandbox(state: Path) -> str:
    """Address of the sandbox that plays the sources; its default port where no `up` runs on `state`."""
    try:
        parts: dict[str, Any] = (await control.ask(state, {}))["parts"]
    except control.NoMesh:
        return f"127.0.0.1:{DEFAULT_PORTS['sandbox']}"
    return str(parts["sandbox"]["address"])
