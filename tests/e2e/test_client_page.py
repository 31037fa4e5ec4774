"""The examples of docs/client.md, each as a program of its own, as a reader would run it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from loanmesh.cli.mesh import Mesh, free_ports
from loanmesh.runtime.clock import SystemClock

PAGE = Path(__file__).parents[2] / "docs" / "client.md"
SAYS = [
    r"lenders/demo/applications/\S+ (\d offers|is safely stored.*)\n",
    r"(\d+ STATE_\w+\n)+.+\n\['accepted'.*\] intact: True\n",
    r"INVALID_ARGUMENT INVALID_REQUEST \[\('application\.loan\.amount_fen', .*\)\]\n",
    r"1200 stored, 0 refused\n",
    r"STATE_OFFER_ACCEPTED\n\d of the newest decided\n",
]
"""What each of them prints, in order."""


async def run(*command: str, folder: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(90):
            said, complained = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, complained.decode()
    return said.decode()


async def test_the_examples_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGE.read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == len(SAYS)
    assert "`loanmesh example person 8 > person.json`" in page
    monkeypatch.setenv("PYTHONPATH", f"{PAGE.parents[1]}", prepend=":")
    mesh = Mesh(tmp_path / "state", None, free_ports(), SystemClock(), print)
    try:
        await mesh.start()
        person = await run("-m", "loanmesh", "example", "person", "8", folder=tmp_path)
        (tmp_path / "person.json").write_text(person, encoding="utf-8")
        for example, says in zip(examples, SAYS, strict=True):
            program = example.replace("127.0.0.1:7401", mesh.parts["intake"].address)
            assert re.fullmatch(says, await run("-c", program, folder=tmp_path))
    finally:
        await mesh.stop()
