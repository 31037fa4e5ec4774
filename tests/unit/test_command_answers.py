"""How commands answer: names as people give them, who gives an order, and what fits a terminal of 80 columns."""

from __future__ import annotations

import getpass
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from lending.ops.v1 import ops_service_pb2 as pb
from rich.console import Console
from typer.testing import CliRunner

from loanmesh.cli import answer, ops, processes, top
from loanmesh.cli.actor import who
from loanmesh.cli.application_name import short, whole
from loanmesh.cli.main import app
from loanmesh.seeing.rates import Picture, Row

ID = "01a20b7e-4166-799b-be1e-d731f8cb7c69"
NAME = f"lenders/demo/applications/{ID}"


@pytest.mark.parametrize("given", [ID, f"applications/{ID}", NAME, f" {NAME}"])
def test_an_application_is_named_whole_or_by_its_id(given: str) -> None:
    assert whole(given, "lenders/demo") == NAME


def test_a_whole_name_says_whose_it_is_and_an_id_is_of_the_lender_that_is_meant() -> None:
    assert whole(NAME, "lenders/other") == NAME
    assert whole(ID, "lenders/other") == f"lenders/other/applications/{ID}"


@pytest.mark.parametrize("given", ["", "lenders/demo", "lenders/demo/applications/", "moon", NAME[:-1]])
def test_what_is_no_name_is_told_before_anybody_is_called(given: str) -> None:
    done = CliRunner().invoke(app, ["get", given, "--address", "127.0.0.1:1"], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "lenders/NAME/applications/ID" in done.output


def test_a_command_tells_of_an_id_where_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert short(NAME) == ID
    monkeypatch.setenv("LOANMESH_LENDER", "lenders/other")
    assert short(NAME) == NAME


def test_who_gives_an_order_is_who_is_logged_in_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert who("li.na") == "li.na"
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    assert who("") == getpass.getuser()

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    with pytest.raises(typer.BadParameter, match="say who orders it"):
        who("")


async def test_without_a_mesh_the_usual_addresses_are_meant(tmp_path: Path) -> None:
    assert await processes.intake(tmp_path) == "127.0.0.1:7401"
    assert await processes.replicas(tmp_path) == {
        "127.0.0.1:7401": "intake", "127.0.0.1:7402": "bureau", "127.0.0.1:7403": "scoring", "127.0.0.1:7404": "pricing"
    }  # fmt: skip


def test_what_to_do_next_is_whole_whatever_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    answer.next_step("`loanmesh parked release --all` " * 9 + "[red]")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("next: ")
    assert line.endswith("[red]")


def test_dependencies_fit_80_columns_with_all_their_names() -> None:
    names = ("central_bank", "registry", "bank_flow")
    many = [
        pb.Dependency(
            name=f"dependencies/{name}", breaker_state=pb.BREAKER_STATE_FORCED_CLOSED, breaker_cause="forced closed",
            in_use=64, in_use_limit=64, waiting=2000, waiting_limit=2000, calls=123_456, failures=12_345, overloads=123,
            refusals=12_345,
        )
        for name in names
    ]  # fmt: skip
    lines = printed(lambda console: ops._print_dependencies(console, pb.ListDependenciesResponse(dependencies=many)))
    for name in (*names, "forced_closed", "64/64", "2000/2000", "123456"):
        assert any(name in line for line in lines), name
    assert len(lines) == 1 + 2 * len(names)


def test_top_fits_80_columns_with_all_its_names() -> None:
    rows = [
        Row(f"127.0.0.{n}:7402", "scoring", f"scoring-18997{n}-976d9b90", "draining", 1234.6, 12.3, 0, 62.5, 1073.8, 15,
            100, 0, 0)
        for n in (1, 12)
    ]  # fmt: skip
    rest: dict[str, str | int | float] = {"waiting_for": "source_missing:court", "applications": 312, "retry_at": 1.0}
    opened = {"dependency": "court", "state": "open", "cause": "3 of 3 calls failed", "at": rows[0].instance}
    lines = printed(lambda console: console.print(top.draw(Picture(rows, 1, 0, 3, [rest], [opened], []), wide=False)))
    for text in ("127.0.0.12:7402", "1,235", "1,074", "3 due now", "312 wait for source_missing:court"):
        assert any(text in line for line in lines), text
    assert any(line.startswith("breaker court open at scoring 127.0.0.1:7402") for line in lines)
    assert sum("scoring" in line for line in lines) == 3
    wide = printed(lambda console: console.print(top.draw(Picture(rows, 1, 0, 3, [], [], []), wide=True)), width=120)
    assert any("scoring-189971-976d9b90" in line for line in wide)


def printed(show: Callable[[Console], None], width: int = 80) -> list[str]:
    out = io.StringIO()
    show(Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    return lines
