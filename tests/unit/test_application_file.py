"""A malformed application is told with its line, column and field; a good one is read as protobuf reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lending.intake.v1.intake_service_pb2 import Application
from typer.testing import CliRunner

from loanmesh.cli.application_file import BadFile, read_application
from loanmesh.cli.jsontext import JsonText, Malformed
from loanmesh.cli.main import app
from tests.builders import NOW, POPULATION, an_application


def read(folder: Path, content: str | bytes) -> Application:
    file = folder / "a.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_application(file)


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        ('{"loan": {\n  "termMonths": 1.5}}', "2:17", "loan.termMonths must be a whole number"),
        ('{"loan":\n {"amountFen": 5,\n "purposeKind": "NOPE"}}', "3:17", "PURPOSE_KIND_CONSUMPTION"),
        ('{"consents": [{},\n{"givenTime": "yesterday"}]}', "2:15", "consents[1].givenTime must be a time such as"),
        ('{"loan": {"purpose": "\\ud800"}}', "1:22", "loan.purpose must be text"),
        ('{\n "loan": {"colour": 1}}', "2:11", "there is no field loan.colour; known are amountFen"),
        ('{"parties": [{},\n {"kind": []}]}', "2:11", "parties[1].kind must be one of"),
        ('{"parties":\n5}', "2:1", "must be a list"),
        ('{"loan":\n5}', "2:1", "must be a JSON object"),
        ('{"parties": [null]}', "1:14", "parties[0] must be a JSON object, not null"),
        ('{"loan": {"amountFen": true}}', "1:24", "not true"),
        ('{"loan": {"amountFen": 1,\n "amountFen": 2}}', "2:2", '"amountFen" stands twice, the first at 1:11'),
        ('{"loan": {"amountFen": 1,\n "amount_fen": 2}}', "2:2", "by another name"),
        ('{"decision": {"reasons": [{"facts": [{"value":\n{"integer": 1, "flag": true}}]}]}}', "2:1", "oneof"),
        ("[" * 100_000, "1:66", "nested deeper"),
        ('{"loan": {"amountFen": ' + "9" * 5_000 + "}}", "1:24", "5000 characters"),
        ('{"loan": {"amountFen": 5,,}}', "1:26", "expected a name"),
        ('{"a": 1 "b": 2}', "1:9", "expected ,"),
        ('{"a": NaN}', "1:7", "expected a value"),
        ('{"a": "b', "1:7", "unterminated"),
        ("[]", "1:1", "must be a JSON object"),
        ("", "1:1", "too early"),
        ("{} {}", "1:4", "after the end"),
        (b'{"loan":\n "\xe4\xb8\xad\xff"}', "2:4", "0xff is not UTF-8"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content: str | bytes, place: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile) as bad:
        read(tmp_path, content)
    assert str(bad.value).startswith(f"{tmp_path / 'a.json'}:{place}: ")
    assert words in str(bad.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="No such file"):
        read_application(tmp_path / "a.json")


def test_a_good_file_is_read_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps(POPULATION.application("firm", 1, NOW), ensure_ascii=False)
    assert read(tmp_path, text) == read(tmp_path, "\ufeff" + text) == an_application("firm", 1)


def test_the_command_says_it_and_sends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"loan": {\n  "termMonths": 1.5}}', encoding="utf-8")
    done = CliRunner().invoke(app, ["submit", str(file)])
    assert done.exit_code == 2
    assert f"{file}:2:17: loan.termMonths" in done.stderr
    assert "nothing was sent" in done.stderr


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.text(),
        st.integers(-(10**12), 10**12),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=JSON, indent=st.none() | st.integers(0, 3))
def test_the_reader_agrees_with_pythons_own_and_knows_each_place(value: Any, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    found = JsonText(text)
    assert found.value == value
    for path, at in found.places.items():
        inner = value
        for step in path:
            inner = inner[step]
        assert json.JSONDecoder().raw_decode(text, at)[0] == inner


@given(text=st.text(alphabet='{}[]:,"\\ \n0123.eE+-truefalsn'))
def test_the_reader_takes_nothing_that_python_refuses_and_never_breaks(text: str) -> None:
    try:
        read = JsonText(text).value
    except Malformed:
        return
    assert json.loads(text) == read
