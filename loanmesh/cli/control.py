"""Talk with a running `up`: a socket in its state folder, one JSON object a line each way.

Asked `{"intake": 3}` it scales, asked `{}` it only looks; it answers what runs, with `error` where it could not.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

LINE_MAX_BYTES = 64 * 1024
PATH_MAX_BYTES = 100
"""Socket addresses hold 104 to 108 bytes, whatever the file system allows."""


class NoMesh(Exception):
    """No mesh runs on this state."""


def path_of(state: Path) -> Path:
    """Where the socket of a mesh on `state` is; outside the folder where its path would be too long."""
    inside = state.resolve() / "control"
    if len(os.fsencode(inside)) <= PATH_MAX_BYTES:
        return inside
    return Path(tempfile.gettempdir()) / f"loanmesh-{hashlib.sha256(os.fsencode(inside)).hexdigest()[:16]}"


async def listen(state: Path, answer: Callable[[Mapping[str, int]], Awaitable[dict[str, object]]]) -> asyncio.Server:
    """Answer until closed. Only this user may ask."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                writer.write(json.dumps(await _said(line, answer)).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):  # Gone while we answered, or a line beyond all bounds.
            pass
        finally:
            writer.close()

    path = path_of(state)
    path.unlink(missing_ok=True)  # Of a mesh that was killed: we hold the lock, so nobody answers there.
    server = await asyncio.start_unix_server(serve, path, limit=LINE_MAX_BYTES)
    path.chmod(0o600)
    return server


async def _said(line: bytes, answer: Callable[[Mapping[str, int]], Awaitable[dict[str, object]]]) -> dict[str, object]:
    try:
        asked = json.loads(line)
    except ValueError:
        asked = None
    if not isinstance(asked, dict) or not all(type(count) is int for count in asked.values()):
        return {"error": 'ask with one JSON object a line, as {"intake": 2}'}
    return await answer(asked)


async def ask(state: Path, wanted: Mapping[str, int]) -> dict[str, Any]:
    """What the mesh on `state` answers. Raises NoMesh."""
    try:
        reader, writer = await asyncio.open_unix_connection(path_of(state), limit=LINE_MAX_BYTES)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NoMesh(f"no mesh runs on {state}") from error
    try:
        writer.write(json.dumps(wanted).encode() + b"\n")
        line = await reader.readline()
    except ConnectionError as error:
        raise NoMesh(f"the mesh on {state} ended before it answered") from error
    finally:
        writer.close()
    if not line:
        raise NoMesh(f"the mesh on {state} ended before it answered")
    answered: dict[str, Any] = json.loads(line)
    return answered


async def answers(state: Path) -> bool:
    """Whether a mesh runs on `state`."""
    try:
        await ask(state, {})
    except NoMesh:
        return False
    return True
