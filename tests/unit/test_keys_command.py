"""`loanmesh keys` and `loanmesh erase`: what they say, what they refuse, and that they never show a key or a number."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loanmesh.cli.main import app
from loanmesh.runtime.clock import SystemClock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.keys import Keys, read_ring
from loanmesh.runtime.migrations import upgrade
from loanmesh.runtime.sealed import Sealer
from services.intake.application import New
from services.intake.privacy import Privacy
from services.intake.store import Store
from tests.builders import an_application

CLOCK = SystemClock()


def run(*words: str, said: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words), input=said)
    return done.exit_code, done.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "intake-keys.json"
    assert run("keys", "new", str(made))[0] == 0
    return made


async def stored(state: Path, file: Path, count: int) -> None:
    url = f"sqlite:///{state / 'intake.db'}"
    await asyncio.to_thread(upgrade, url, "services.intake")
    database = await open_database(url)
    store = Store(database, CLOCK, "a", 30.0, Privacy(Sealer(Keys(read_ring(file), CLOCK))))
    payload = an_application().SerializeToString(deterministic=True)
    news = [
        New(f"id-{n}", "lenders/demo", "c", f"request-{n}", payload, "hash", 1, "app", 1.0, "", ("x",))
        for n in range(count)
    ]
    await store.accept([(new, False) for new in news])
    await database.close()


def test_keys_are_made_once_and_never_shown(file: Path) -> None:
    assert run("keys", "new", str(file))[0] == 1
    code, shown = run("keys", "show", str(file), "--json")
    assert code == 0
    assert [one["state"] for one in json.loads(shown)] == ["in use", "in use"]
    said = shown + run("keys", "rotate", str(file))[1] + run("keys", "show", str(file))[1]
    secrets = [one["secret"] for keys in json.loads(file.read_text()).values() for one in keys]
    assert len(secrets) == 4
    assert not any(secret in said for secret in secrets)


def test_a_rotation_moves_what_is_stored_and_only_then_lets_the_old_key_go(file: Path) -> None:
    state = file.parent
    asyncio.run(stored(state, file, 5))
    old = read_ring(file)
    assert run("keys", "retire", old.seal.keys[0].id, "intake", "--state", str(state))[0] == 4
    assert run("keys", "rotate", str(file), "--ahead", "0")[0] == 0
    code, said = run("keys", "retire", old.seal.keys[0].id, "intake", "--state", str(state))
    assert (code, "5 rows still need" in said) == (4, True)
    code, said = run("keys", "reseal", "intake", "--state", str(state), "--json")
    assert (code, json.loads(said)["moved"]) == (0, 5)
    for key in (old.seal.keys[0].id, old.look_up.keys[0].id):
        assert run("keys", "retire", key, "intake", "--state", str(state))[0] == 0
    ring = read_ring(file)
    assert [len(ring.seal.keys), len(ring.look_up.keys)] == [1, 1]
    assert json.loads(run("keys", "use", "intake", "--state", str(state), "--json")[1]) == {
        ring.seal.keys[0].id: 5, ring.look_up.keys[0].id: 5
    }  # fmt: skip
    assert run("keys", "retire", "no-such-key", "intake", "--state", str(state))[0] == 2


@pytest.mark.parametrize("said", ["", "990001199001011234x", "990001199001011234", "张三"])
def test_a_subject_file_must_hold_one_number_and_is_not_shown(tmp_path: Path, said: str) -> None:
    file = tmp_path / "subject.txt"
    file.write_text(said)
    code, told = run("erase", "--lender", "lenders/demo", "--subject-file", str(file), "--actor", "dpo")
    assert code == 2
    assert not said or said not in told


def test_erase_says_when_nobody_answers(tmp_path: Path) -> None:
    file = tmp_path / "subject.txt"
    file.write_text(an_application().parties[0].identity.value)
    words = ("--lender", "lenders/demo", "--actor", "dpo", "--address", "127.0.0.1:1")
    code, told = run("erase", "--subject-file", str(file), *words)
    assert (code, "not reachable" in told) == (3, True)
    assert file.read_text() not in told
