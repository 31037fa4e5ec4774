"""Every command of every runbook, run in order against a mesh on which that has happened which the page is about."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
from lending.intake.v1.intake_service_pb2 import Application
from typer.testing import CliRunner

from lab.drills import free_base
from loanmesh.cli.main import app
from loanmesh.client import Client, Security
from loanmesh.runtime.clock import SystemClock
from tests.builders import an_application
from tests.runbook import FOLDER, Command, Event, filled, steps, unmarked

PAGES = sorted(FOLDER.glob("*.md"))
LOANMESH = [sys.executable, "-m", "loanmesh"]
SHOWN_WITHIN_S = 60.0
QUICK = {
    "INTAKE_LEASE__DURATION_S": "3", "INTAKE_LEASE__POLL_S": "0.3",
    "INTAKE_PARKING__ATTEMPTS_MAX": "2", "INTAKE_PARKING__WAIT_S_FIRST": "0.1",
}  # fmt: skip
"""So that takeovers and attempts take moments here, where they take minutes in earnest."""
CLOCK = SystemClock()


class Ended(NamedTuple):
    """How a command ended, and what it printed: for machines, and all of it."""

    code: int
    stdout: str
    output: str


@dataclass
class Mesh:
    """A mesh of `loanmesh up`, mTLS and PostgreSQL as in earnest, and what can happen to it."""

    state: Path
    ready: dict[str, Any]
    known: dict[str, str]
    """What stands for the words in capitals."""
    environment: dict[str, str]
    subjects: Iterator[int] = field(default_factory=lambda: iter(range(100, 10_000)))
    """Of synthetic people. Each is used once: what a source said of somebody is remembered."""
    sound: tuple[object, ...] = ()
    """What stood where bytes that are no application stand now."""

    def run(self, line: str) -> Ended:
        """One command line of `loanmesh`, in this process: sixty starts of Python would take a minute."""
        words = shlex.split(line)
        assert words[0] == "loanmesh", f"{line}: only our own command can be run here"
        done = CliRunner().invoke(app, words[1:], env=self.environment)
        return Ended(done.exit_code, done.stdout, done.output)

    def happens(self, words: str) -> None:
        """Let what a page tells of happen."""
        events: dict[str, Callable[[], object]] = {
            "a source dies": self.source_dies,
            "the source is back": lambda: self.fault(dead=False),
            "scoring is killed": lambda: self.kill("scoring"),
            "many applications come": lambda: self.submitted(50, wait_s=0),
            "an application is decided": self.decided,
            "an application is stored, then the database dies": self.database_dies,
            "an application is poisoned": self.poison,
            "the application is mended": lambda: asyncio.run(self.write(self.known["PARKED"], *self.sound)),
        }
        events[words]()

    def source_dies(self) -> None:
        self.fault(dead=True)
        self.known["APPLICATION"] = self.submitted(12, wait_s=0)[0]

    def decided(self) -> None:
        names = self.submitted(8, wait_s=60)
        declined = self.run("loanmesh list --filter 'outcome = DECLINED'").stdout
        assert any(name in declined for name in names), "one of eight synthetic people is declined"
        self.known["APPLICATION"] = names[0]

    def database_dies(self) -> None:
        self.known["APPLICATION"] = self.submitted(1, wait_s=0)[0]
        pid = int((self.state / "postgres" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGQUIT)

    def poison(self) -> None:
        """Bytes that are no application, where one stood: it cannot even be opened."""
        self.fault(dead=True)
        (name,) = self.submitted(1, wait_s=0)
        run_until_shown(self.run, Command(f"loanmesh get {name}", "source_missing:court"))
        self.known["PARKED"] = name
        # Unsealed, as a release before sealing wrote it: what is sealed cannot be changed unnoticed.
        self.sound = asyncio.run(self.write(name, b"\xff\xff\xff", None, None))
        # The source stays away until then: who holds the application in memory could decide it yet.
        run_until_shown(self.run, Command("loanmesh parked list", name))
        self.fault(dead=False)

    async def write(self, name: str, *columns: object) -> tuple[object, ...]:
        """Put another payload, key and wrapped key where an application stands; returns those before."""
        connection: Any = await asyncpg.connect(f"postgresql://postgres@/intake?host={self.state / 'postgres'}")
        try:
            row = name.rsplit("/", 1)[1]
            before = await connection.fetchrow("SELECT payload, key_id, data_key FROM application WHERE id = $1", row)
            change = "UPDATE application SET payload = $2, key_id = $3, data_key = $4 WHERE id = $1"
            await connection.execute(change, row, *columns)
            return tuple(before)
        finally:
            await connection.close()

    def fault(self, **fault: object) -> None:
        """Break or mend the court's register."""
        request = urllib.request.Request(
            f"http://{self.ready['parts']['sandbox']['address']}/control/faults",
            data=json.dumps({"source": "court", **fault}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200

    def kill(self, service: str) -> None:
        """End a replica without a word."""
        running = json.loads(self.run("loanmesh scale --json").stdout)
        os.kill(running["parts"][service]["pid"], signal.SIGKILL)

    def submitted(self, count: int, wait_s: float) -> list[str]:
        """Submit applications of people who were never seen before; their names."""
        wanted = [an_application("person", next(self.subjects), CLOCK.now()) for _ in range(count)]
        return [application.name for application in asyncio.run(self._submit(wanted, wait_s))]

    async def _submit(self, wanted: Sequence[Application], wait_s: float) -> list[Application]:
        security = Security.in_folder(self.state / "certs" / "clients" / "local")
        async with Client(self.known["INTAKE"], security=security, patience_s=90) as client:
            return await asyncio.gather(*(client.submit(one, wait_s=wait_s) for one in wanted))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One mesh for all pages; each leaves it as it found it."""
    folder = tmp_path_factory.mktemp("runbooks")
    state = folder / "state"
    environment = {**os.environ, **QUICK, "LOANMESH_STATE": str(state), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [*LOANMESH, "up", "--json", "--port-base", str(free_base()), "--tls", "--database", "postgres"]
    with (folder / "up.log").open("w") as log:
        process = subprocess.Popen([*command, "--replicas", "bureau=2"], stdout=subprocess.PIPE, stderr=log, text=True,
                                   env=environment)  # fmt: skip
        assert process.stdout
        first = process.stdout.readline()
        assert first, (folder / "up.log").read_text()
        ready = json.loads(first)
        addresses = {name.upper(): part["address"] for name, part in ready["parts"].items()}
        environment |= {"LOANMESH_CERTS": str(state / "certs"), "LOANMESH_ADDRESS": addresses["INTAKE"]}
        known = {
            **addresses,
            "BUREAU_2": ready["replicas"]["bureau"][1]["address"],
            "FILE": str(folder / "application.json"),
            "FOLDER": str(folder),
            "PROMOTION": "deploy/promotions/small.yaml",
        }
        made = Mesh(state, ready, known, environment)
        Path(known["FILE"]).write_text(made.run("loanmesh example person 3").stdout, encoding="utf-8")
        try:
            yield made
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


@pytest.mark.postgres
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_does_what_the_page_says(mesh: Mesh, page: Path) -> None:
    ran = 0
    for step in steps(page):
        if isinstance(step, Event):
            mesh.happens(step.words)
            continue
        ran += 1
        run_until_shown(mesh.run, Command(filled(step.line, mesh.known), filled(step.shows, mesh.known)))
    assert ran


def run_until_shown(run: Callable[[str], Ended], command: Command) -> None:
    """Run a command, and again until it shows what it is to show; it must end well then."""
    until_s = CLOCK.monotonic() + SHOWN_WITHIN_S
    while True:
        done = run(command.line)
        # Tables are for people: how wide a column is says nothing.
        if done.code == 0 and " ".join(command.shows.split()) in " ".join(done.output.split()):
            return
        said = f"{command.line} ended with {done.code}:\n{done.output}"
        assert command.shows, said
        assert CLOCK.monotonic() < until_s, f"{command.shows!r} is not shown: {said}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_of_code_is_left_out(page: Path) -> None:
    assert not unmarked(page)
