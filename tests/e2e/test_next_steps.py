"""Every command there is, run against a mesh: it does what it says, and ends by saying what to do next."""

from __future__ import annotations

import datetime as dt
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lab.drills import free_base
from loanmesh.cli.answer import NEXT
from loanmesh.cli.firms import COLUMN, FILE
from loanmesh.cli.main import app
from loanmesh.runtime.clock import SystemClock
from tests.e2e.test_command import LOANMESH

SAMPLE = "deploy/promotions/double-twelve.yaml"
RUNNER = CliRunner()
CLOCK = SystemClock()
TELLS_WITHIN_S = 30.0
ELSEWHERE = {
    ("serve",): "is a service, which tells its log; `loanmesh up` starts them for people",
    ("parked", "show"): "needs a parked application: tests/integration/test_parking.py",
    ("parked", "release"): "needs a parked application: tests/integration/test_parking.py",
}
"""Commands that are not run here, and why."""


def tree(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from tree(command, *words, name)
        else:
            yield (*words, name), command


COMMANDS = dict(tree(typer.main.get_command(app)))


@dataclass(frozen=True)
class Mesh:
    """A mesh that `up` runs, as a newcomer has it: nothing is known of it but its state folder."""

    state: Path
    base: int
    said: list[str]
    """What `up` said until it was ready."""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    state, base = tmp_path_factory.mktemp("mesh") / "state", free_base()
    words = [*LOANMESH, "up", "--state", str(state), "--port-base", str(base)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line.rstrip())
        if line.startswith(NEXT):
            break
    assert process.poll() is None, said
    yield Mesh(state, base, said)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.splitlines()[-1].startswith(NEXT), out


class Person:
    """Runs commands one after the other, and looks at the end of each answer."""

    def __init__(self, mesh: Mesh, folder: Path, json_: bool) -> None:
        self.folder = folder
        self.ran: set[tuple[str, ...]] = set()
        self._json = json_
        self._environment = {"LOANMESH_STATE": str(mesh.state), "COLUMNS": "80", "XDG_CONFIG_HOME": str(folder)}

    def run(self, *words: str, code: int = 0, **environment: str) -> Result:
        command = next(words[:size] for size in (1, 2) if words[:size] in COMMANDS)
        self.ran.add(command)
        takes_json = any(one.name == "json_" for one in COMMANDS[command].params)
        asked = [*words, "--json"] if self._json and takes_json else list(words)
        done = RUNNER.invoke(app, asked, env=self._environment | environment)
        assert done.exit_code == code, f"{asked}: {done.output} {done.exception!r}"
        if self._json and takes_json:
            assert NEXT not in done.output, asked
        else:
            said = [text.rstrip().splitlines()[-1] for text in (done.stdout, done.stderr) if text.strip()]
            assert any(line.startswith(NEXT) for line in said), f"{asked} does not say what to do next: {done.output}"
        return done

    def until(self, shown: Callable[[], bool]) -> None:
        """Wait for the mesh to come so far."""
        give_up = CLOCK.monotonic() + TELLS_WITHIN_S
        while not shown():
            assert CLOCK.monotonic() < give_up

    def asked(self, *words: str) -> Any:
        """What a command tells machines."""
        done = RUNNER.invoke(app, [*words, "--json"], env=self._environment)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)


def work_with_applications(person: Person, mesh: Mesh) -> None:
    subject = 7000 if person.folder.name == "person" else 9000  # Whom nobody has asked about yet.
    file = person.folder / "a.json"
    file.write_text(person.run("example", "person", str(subject)).stdout, encoding="utf-8")
    person.run("source")
    person.run("source", "court", "dead")
    person.run("submit", str(file), "--wait", "1")
    person.until(lambda: bool(person.asked("why-failed")))
    person.run("why-failed", "--since", "10m")
    waiting = person.asked("list", "--filter", "state = PENDING")["applications"][0]["name"].rpartition("/")[2]
    person.until(lambda: RUNNER.invoke(app, ["trace", waiting, "--state", str(mesh.state)]).exit_code == 0)
    for command in ("trace", "get", "history"):
        person.run(command, waiting)
    person.run("status")
    person.run("deps")
    person.run("top", "--once")
    person.run("override", "court", "open", "--reason", "a drill", "--actor", "li.na")
    person.run("deps")
    person.run("override", "court", "auto")
    person.run("source", "court", "well")
    person.run("watch", waiting)
    for command in ("list", "get", "trace"):
        person.run(command, *([] if command == "list" else [waiting]))
    person.run("explain", waiting, "--schedules")
    person.run("replay", waiting)
    person.run("history", waiting)
    person.run("list", "--filter", "grade = E AND outcome = APPROVED")
    offered = next(
        one["name"]
        for seed in range(subject, subject + 200, 5)
        if "offers" in (one := decided(person, seed))["decision"]
    )
    person.run("accept", offered.rpartition("/")[2])
    subject_file = person.folder / "subject.txt"
    borrower = json.loads(file.read_text(encoding="utf-8"))["parties"][0]
    subject_file.write_text(borrower["identity"]["value"], encoding="utf-8")
    for words in (["--dry-run"], []):
        person.run("erase", "--lender", "lenders/demo", "--subject-file", str(subject_file), *words)
    person.run("parked", "list")
    person.run("scale")
    person.run("scale", "scoring=2")
    person.run("scale", "scoring=1")


def decided(person: Person, subject: int) -> Any:
    file = person.folder / "b.json"
    file.write_text(RUNNER.invoke(app, ["example", "person", str(subject)]).stdout, encoding="utf-8")
    return person.asked("submit", str(file), "--wait", "20")


def decide_firms(person: Person, mesh: Mesh) -> None:
    polars = pytest.importorskip("polars")
    (person.folder / FILE).write_text(f"{COLUMN}\nE1\n", encoding="utf-8")
    invoice = {"firm": "E1", "dir": "out", "grp": "x", "amount": 900.0, "date": dt.date(2020, 2, 28), "valid": True,
               "cpty": "a"}  # fmt: skip
    polars.DataFrame([invoice]).write_parquet(person.folder / "cn_sme_invoices.parquet")
    at = ("--address", f"127.0.0.1:{mesh.base}", "--sandbox", f"127.0.0.1:{mesh.base + 4}")
    person.run("decide-firms", str(person.folder), *at)


def keep_keys(person: Person) -> None:
    state = person.folder / "state"
    state.mkdir()
    file = str(state / "intake-keys.json")
    old = person.run("keys", "new", file)
    person.run("keys", "show", file)
    person.run(
        "migrate", "intake", INTAKE_DATABASE_URL=f"sqlite:///{state / 'intake.db'}", INTAKE_PRIVACY__KEYS_FILE=file
    )
    person.run("keys", "rotate", file, "--ahead", "0")
    person.run("keys", "reseal", "intake", "--state", str(state))
    person.run("keys", "use", "intake", "--state", str(state))
    key = next(one["id"] for one in person.asked("keys", "show", file) if one["state"] != "in use")
    assert key in old.output
    person.run("keys", "retire", key, "intake", "--state", str(state))


def keep_certificates(person: Person) -> None:
    at = ("--dir", str(person.folder / "certs"))
    person.run("certs", "init", *at)
    person.run("certs", "show", *at)
    person.run("certs", "issue", "service", "intake", *at)
    person.run("certs", "issue", "client", "shop", *at)
    person.run("certs", "renew", *at)
    person.run("certs", "rotate-ca", *at)
    person.run("certs", "renew", "--all", *at)
    person.run("certs", "retire-ca", *at)
    person.run("certs", "show", *at)


def plan_a_promotion(person: Person) -> None:
    rounds = {name: {"cpu_ms": {"intake": 1.5, "bureau": 1.9, "scoring": 0.25, "pricing": 0.43}}
              for name in ("one by one, cold", "one by one, warm", "accepts one by one")}  # fmt: skip
    bench = {"quick": False, "machine": {"cores": 2, "kind": "x", "python": "3.11"}, "measured": {"core": rounds}}
    (person.folder / "bench.json").write_text(json.dumps(bench), encoding="utf-8")
    person.run("promotion", "capacity", str(person.folder / "bench.json"))
    person.run("promotion", "plan", SAMPLE)
    person.run("promotion", "plan", SAMPLE, "--out", str(person.folder / "plan"))
    person.run("promotion", "simulate", SAMPLE, "--scale", "0.01")


@pytest.mark.parametrize("reader", ["person", "json"])
def test_every_command_says_what_to_do_next_to_people_and_not_to_machines(
    mesh: Mesh, reader: str, tmp_path: Path
) -> None:
    folder = tmp_path / reader
    folder.mkdir()
    person = Person(mesh, folder, json_=reader == "json")
    work_with_applications(person, mesh)
    decide_firms(person, mesh)
    keep_keys(person)
    keep_certificates(person)
    plan_a_promotion(person)
    person.run("settings", "intake")
    if reader == "person":
        person.run("demo")
    else:
        person.ran.add(("demo",))  # A mesh of its own, for quarter of a minute: once is enough.
    person.ran.add(("up",))
    assert any(line.startswith(NEXT) for line in mesh.said)
    assert set(COMMANDS) - person.ran - set(ELSEWHERE) == set(), "commands that nobody runs here"
    assert person.ran.isdisjoint(ELSEWHERE)


def test_top_shows_the_mesh_live_until_ctrl_c(mesh: Mesh) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "LOANMESH_STATE": str(mesh.state), "COLUMNS": "80", "TERM": "xterm"}
    top = subprocess.Popen([*LOANMESH, "top", "--every", "0.2"], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    while said.count(NEXT.encode()) < 3:
        assert top.poll() is None, said.decode()
        said += os.read(ours, 4096)
    top.send_signal(signal.SIGINT)
    assert top.wait(30) == 130
    os.close(ours)
    assert b"127.0.0.1" in said
    assert b"Traceback" not in said
