"""Numbers of replicas as a person writes them, and where the control socket of a state is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lab.outside import Outside
from loanmesh.cli.control import NoMesh, ask, path_of
from loanmesh.cli.mesh import CannotStart, Mesh, free_ports, read_replicas
from loanmesh.runtime.clock import SystemClock


def test_replicas_are_read_from_one_word_or_several() -> None:
    assert read_replicas(["intake=2,bureau=3", "pricing=1"]) == {"intake": 2, "bureau": 3, "pricing": 1}
    assert read_replicas([]) == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [("intake", "SERVICE=NUMBER"), ("intake=two", "SERVICE=NUMBER"), ("intake=-1", "SERVICE=NUMBER"),
     ("intake=0", "1 to 12"), ("intake=13", "1 to 12"), ("sandbox=2", "sandbox"), ("moon=2", "moon")],
)  # fmt: skip
def test_what_cannot_be_is_named(word: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_replicas([word])


def test_the_control_socket_has_a_path_that_sockets_can_have(tmp_path: Path) -> None:
    assert path_of(Path("/run/mesh")) == Path("/run/mesh/control")
    deep = [tmp_path / ("x" * 60) / ("y" * 60) / end for end in "ab"]
    assert all(len(str(path_of(state))) < 100 for state in deep)
    assert path_of(deep[0]) != path_of(deep[1])
    assert path_of(deep[0]) == path_of(deep[0])


async def test_asking_where_no_mesh_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoMesh, match=str(tmp_path)):
        await ask(tmp_path, {})


def test_only_an_end_that_nobody_asked_for_is_a_crash() -> None:
    mesh = Outside(Path("state"), [], {})
    mesh.said = [
        "intake-2 ended (-9); starting it again",
        "bureau ended (0); starting it again",
        "bureau ended (1); starting it again",
        "pricing ended (-15); starting it again",
        "scoring-3 ended (-11); starting it again",
        "intake-2 is back (pid 11)",
    ]
    assert mesh.crashes() == ["scoring-3 ended (-11)"]


async def test_a_mesh_may_be_stopped_twice_and_grows_no_more(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path, None, free_ports(), SystemClock(), print)
    async with asyncio.timeout(30):
        await asyncio.gather(mesh.stop(), mesh.stop())
        await mesh.stop()
        with pytest.raises(CannotStart, match="stopping"):
            await mesh.scale({"intake": 2})
