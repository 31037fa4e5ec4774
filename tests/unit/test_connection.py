"""The options about TLS: on every command that has an address, and told in words where they do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loanmesh.cli.authority import Authority, Subject
from loanmesh.cli.main import app
from loanmesh.runtime.clock import SystemClock

RUNNER = CliRunner()
NAME = "lenders/demo/applications/" + "0" * 36


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield (*words, name), command


def test_every_command_with_an_address_takes_the_options_about_tls() -> None:
    wanted = {"tls_ca", "tls_cert", "tls_key", "token_file"}
    found = {words: {one.name for one in command.params} for words, command in commands(typer.main.get_command(app))}
    with_address = {words for words, names in found.items() if "address" in names}
    assert {("get",), ("submit",), ("status",), ("parked", "list")} <= with_address
    assert {words for words in with_address if not wanted <= found[words]} == set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    authority = Authority(tmp_path, SystemClock().now)
    authority.create("loanmesh")
    return authority.issue(Subject("client", "local"))


def refused(*words: str) -> str:
    done = RUNNER.invoke(app, ["get", NAME, *words], env={"COLUMNS": "300"})
    assert done.exit_code == 2, done.output
    return done.output


def test_what_does_not_go_together_is_said_before_anybody_is_called(folder: Path) -> None:
    ca, certificate, key = (str(folder / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    assert "--tls-ca" in refused("--tls-cert", certificate, "--tls-key", key)
    assert "go together" in refused("--tls-ca", ca, "--tls-cert", certificate)
    assert "does not exist" in refused("--tls-ca", "/nowhere/ca.crt")
    assert "holds no certificate" in refused("--tls-ca", key)
    assert "is not on this machine" in refused("--address", "10.0.0.1:7401")
