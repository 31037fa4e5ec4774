"""The keys file: what it may hold, what happens when it changes, and that it is never shown."""

from __future__ import annotations

import base64
import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.keys import Key, KeyRing, Keys, KeySet, WrongKeys, new_key, new_ring, read_ring, write_ring
from loanmesh.runtime.setting_rules import WrongSetting

CLOCK = FakeClock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_written_ring_is_read_again_and_is_its_owners_alone(path: Path) -> None:
    ring = new_ring(CLOCK.now())
    write_ring(path, ring, new=True)
    assert read_ring(path) == ring
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_keys_that_are_there_are_never_written_over_by_new_ones(path: Path) -> None:
    write_ring(path, new_ring(CLOCK.now()), new=True)
    with pytest.raises(FileExistsError):
        write_ring(path, new_ring(CLOCK.now()), new=True)


def a_file(**changes: Any) -> str:
    key = {"id": "k-1", "current_from": "2026-11-24T00:00:00Z", "secret": base64.b64encode(bytes(range(32))).decode()}
    return json.dumps({"seal": [key | changes], "look_up": [key]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "exactly seal and look_up"),
        ('{"seal": []}', "exactly seal and look_up"),
        ('{"seal": [], "look_up": []}', "at least one key"),
        ('{"seal": [7], "look_up": []}', r"seal\[0\] must have exactly id"),
        (a_file(more=1), "exactly id, current_from and secret"),
        (a_file(id="K 1"), r"seal\[0\].id must be"),
        (a_file(current_from="today"), "current_from must be a time with its zone"),
        (a_file(current_from="2026-11-24T00:00:00"), "current_from must be a time with its zone"),
        (a_file(secret="c2hvcnQ="), r"secret must be 32 bytes"),
        (a_file(secret="!" * 44), r"secret must be 32 bytes"),
        (a_file(secret=7), r"secret must be 32 bytes"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_place(path: Path, text: str, why: str) -> None:
    path.write_text(text)
    with pytest.raises(WrongKeys, match=why) as refused:
        read_ring(path)
    assert "c2hvcnQ=" not in str(refused.value)
    with pytest.raises(WrongSetting, match=r"INTAKE_PRIVACY__KEYS_FILE: .*keys\.json"):
        Keys.open("INTAKE_PRIVACY__KEYS_FILE", path, CLOCK)


def test_a_missing_file_says_how_to_make_one(path: Path) -> None:
    with pytest.raises(WrongKeys, match="loanmesh keys new"):
        read_ring(path)


def test_no_text_made_of_keys_shows_a_secret() -> None:
    ring = new_ring(CLOCK.now())
    for key in (*ring.seal.keys, *ring.look_up.keys):
        shown = f"{ring!r} {key} {KeySet((key,))}"
        assert repr(key.secret) not in shown
        assert base64.b64encode(key.secret).decode() not in shown


def dated(*days: int) -> KeySet:
    at = CLOCK.now()
    return KeySet(tuple(Key(f"k-{day}", at + dt.timedelta(days=day), bytes(32)) for day in days))


def test_the_newest_key_in_use_is_current_and_one_dated_ahead_waits() -> None:
    assert dated(-9, -1, 1).current(CLOCK.now()).id == "k--1"
    assert dated(1, 2).current(CLOCK.now()).id == "k-1"


async def test_a_changed_file_is_read_again(path: Path) -> None:
    ring = new_ring(CLOCK.now())
    write_ring(path, ring)
    keys = Keys.open("X", path, CLOCK)
    more = new_key("seal", CLOCK.now() + dt.timedelta(seconds=1))
    write_ring(path, KeyRing(KeySet((*ring.seal.keys, more)), ring.look_up))
    # Another replica may seal with it before we looked: then we look at once.
    assert keys.sealed_with(more.id) == more
    assert keys.generation == 1


def test_a_file_that_goes_bad_leaves_the_keys_in_force(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ring = new_ring(CLOCK.now())
    write_ring(path, ring)
    keys = Keys.open("X", path, CLOCK)
    path.write_text("{")
    keys.look()
    keys.look()
    assert keys.ring == ring
    assert capsys.readouterr().out.count("keys_unusable") == 1
    path.unlink()
    with pytest.raises(DependencyDown):
        keys.sealed_with("k-unknown")
