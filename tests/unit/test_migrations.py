"""When tables change: at a start, or by a command of its own."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loanmesh.cli.main import app
from loanmesh.runtime.migrations import OldTables, check, downgrade, prepare, upgrade
from loanmesh.runtime.opening import opening
from loanmesh.runtime.setting_rules import NotReachable


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/intake.db"


def test_a_service_that_only_checks_does_not_start_before_its_tables(url: str) -> None:
    with pytest.raises(OldTables, match=r"at no version, this release needs [0-9]+: run `loanmesh migrate intake`"):
        prepare(url, "services.intake", "check")


def test_tables_of_an_older_release_hold_a_start_up(url: str) -> None:
    upgrade(url, "services.intake", "0001")
    with pytest.raises(OldTables, match="at 0001"):
        check(url, "services.intake")


def test_tables_of_a_newer_release_do_not(url: str) -> None:
    upgrade(url, "services.intake")
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE intake_version SET version_num = '9999'")
    connection.close()
    check(url, "services.intake")


def test_whoever_goes_back_a_release_leaves_the_newer_tables_as_they_are(url: str) -> None:
    upgrade(url, "services.intake")
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE intake_version SET version_num = '9999'")
    upgrade(url, "services.intake")
    assert connection.execute("SELECT version_num FROM intake_version").fetchall() == [("9999",)]
    connection.close()


def test_tables_that_wait_for_their_migration_are_worth_another_start(url: str) -> None:
    with pytest.raises(NotReachable, match="INTAKE_DATABASE_URL: the tables"), opening("INTAKE_DATABASE_URL", url):
        check(url, "services.intake")


def test_migrate_brings_tables_up_to_date_and_may_be_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE_DATABASE_URL", url)
    for _ in range(2):
        assert CliRunner().invoke(app, ["migrate", "intake"]).exit_code == 0
        check(url, "services.intake")
    downgrade(url, "services.intake")


@pytest.mark.parametrize("command", [["migrate", "pricing"], ["serve", "sandbox"]])
def test_what_there_is_not_is_wrong_usage(command: list[str]) -> None:
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 2
    assert "must be one of" in answer.output
