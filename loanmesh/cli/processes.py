"""Which processes a command means where none is named: those of the mesh that `up` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loanmesh.cli import control
from loanmesh.cli.mesh import DEFAULT_PORTS, SERVICES


async def replicas(state: Path) -> dict[str, str]:
    """Names of all replicas of all services by address; those of the default ports where no `up` runs on `state`."""
    running = await _running(state)
    if running is None:
        return {_usual(name): name for name in SERVICES}
    return {str(one["address"]): str(one["name"]) for name in SERVICES for one in running["replicas"][name]}


async def intake(state: Path) -> str:
    """What leads to all replicas of intake; its default port where no `up` runs on `state`."""
    running = await _running(state)
    return _usual("intake") if running is None else str(running["targets"]["intake"])


async def sandbox(state: Path) -> str:
    """Address of the sandbox that plays the sources; its default port where no `up` runs on `state`."""
    running = await _running(state)
    return _usual("sandbox") if running is None else str(running["parts"]["sandbox"]["address"])


async def _running(state: Path) -> dict[str, Any] | None:
    try:
        return await control.ask(state, {})
    except control.NoMesh:
        return None


def _usual(name: str) -> str:
    return f"127.0.0.1:{DEFAULT_PORTS[name]}"
