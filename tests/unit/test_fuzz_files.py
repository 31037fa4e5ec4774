"""Mutated settings, policies, promotions, tables and models: refused clearly, or accepted and working."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate, load_pem_x509_certificate

from lab.fuzz import files
from lab.fuzz.refused import Refused
from loanmesh.runtime.certificates import is_signed_by
from services.scoring.model import ModelError, parse_model

KINDS = list(files.kinds())
REFUSED = 7
READ_RULES = f"""
import sys
from lab.fuzz import files
from lab.fuzz.refused import Refused
text, _, read = files.kinds()["policy rules"]
other = text{{change}}
assert other != text
try:
    read(other.encode())
except Refused:
    sys.exit({REFUSED})
"""
MODEL = "consumer-2026-11"


@pytest.mark.parametrize("name", KINDS)
def test_a_sound_file_is_accepted_and_works(name: str) -> None:
    files.sound(name)


@pytest.mark.parametrize("name", KINDS)
def test_an_odd_one_is_refused_clearly_or_works(name: str) -> None:
    seed = int.from_bytes(os.urandom(4))
    found = files.fuzz(name, seed, 12)
    assert found.unexpected == [], f"seed {seed}"


# --- What the long run found ---


@pytest.mark.parametrize(
    "odd",
    [
        "at: 2026-13-45",
        f"at: {'1' * 5000}",
        "[" * 100_000,
        "{a: " * 1200,
        "- " * 1200,
        "a: !unknown 1",
        "? [1]\n: 2",
        "intake: &a [*a]",
        "a: &a [1]\nb: *a",
        "a: 1\na: 2",
        "a: x\n" + "#" * 1_000_000,
    ],
)
@pytest.mark.parametrize("name", KINDS[:7])
def test_what_yaml_cannot_hold_is_a_clear_refusal_everywhere(name: str, odd: str) -> None:
    _, _, read = files.kinds()[name]
    with pytest.raises(Refused):
        read(odd.encode())


def test_a_setting_without_a_name_is_refused() -> None:
    with pytest.raises(Refused, match="is no name of a setting"):
        files.settings_file(b"intake:\n  null: 1\n")


def test_an_example_that_its_rule_cannot_read_is_refused_when_it_is_published() -> None:
    text, _, read = files.kinds()["policy rules"]
    right = "{registry.is_active: true}"
    assert right in text
    with pytest.raises(Refused, match=r"examples.*registry\.is_active"):
        read(text.replace(right, "{registry.is_active: []}").encode())
    with pytest.raises(Refused, match="cannot be"):
        read(text.replace(right, f"{{registry.is_active: {2**70}}}").encode())


def ends(code: str) -> int:
    """How a process of its own ends that runs that: what it is about would take this one along."""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    return said.returncode


def test_an_example_that_holds_itself_is_refused_and_ends_no_process() -> None:
    change = '.replace("{registry.is_active: true}", "{registry.is_active: &a [*a]}")'
    assert ends(READ_RULES.format(change=change)) == REFUSED


@pytest.mark.parametrize("chain", ["1 + ", "a.", "!", "("])
def test_a_condition_without_end_is_refused_and_ends_no_process(chain: str) -> None:
    change = f'.replace("court.is_dishonest_debtor\\n", {chain!r} * 100_000 + "1\\n", 1)'
    assert ends(READ_RULES.format(change=change)) == REFUSED


@pytest.mark.parametrize(
    "condition",
    [
        "[court.is_dishonest_debtor][5]",
        "{1: court.is_dishonest_debtor}[2]",
        f'court.is_dishonest_debtor || "{"9" * 400}" == "x"',
    ],
)
def test_a_condition_that_breaks_when_it_runs_is_refused_when_it_is_published(condition: str) -> None:
    text, _, read = files.kinds()["policy rules"]
    right = "declines_if: court.is_dishonest_debtor\n"
    assert right in text
    with pytest.raises(Refused, match="DISHONEST_DEBTOR: declines_if"):
        read(text.replace(right, f"declines_if: '{condition}'\n").encode())


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("amount_fen: {min: 100000, max: 20000000}", "amount_fen: {min: -1, max: 20000000}"),
        ("term_months: {min: 3, max: 36}", "term_months: {min: 3, max: 361}"),
        ("term_months: {min: 3, max: 36}", "term_months: {min: 0, max: 36}"),
    ],
)
def test_a_product_for_which_no_schedule_can_be_made_is_refused(right: str, wrong: str) -> None:
    text, _, read = files.kinds()["policy products"]
    assert right in text
    with pytest.raises(Refused, match="must lie within"):
        read(text.replace(right, wrong).encode())


def changed(change: Callable[[Any], None]) -> bytes:
    text = (resources.files("services.scoring") / "artefacts" / f"{MODEL}.json").read_text(encoding="utf-8")
    whole = json.loads(text)
    change(whole)
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.pop("terms"), "terms: Field required"),
        (lambda model: model["terms"][0]["values"].pop(), "values, not"),
        (lambda model: model["terms"][0]["edges"].reverse(), "edges must grow"),
        (lambda model: model["terms"][0].update(missing=float("nan")), "finite"),
        (lambda model: model["terms"].append(model["terms"][0]), "counts twice"),
        (lambda model: model["bands"].update(E=0.9), "bands must grow"),
        (lambda model: model["bands"].pop("A") and model["bands"].update(B=0.5), "bands must grow"),
        (lambda model: model.update(intercept="0"), "intercept: Input should be a valid number"),
        (lambda model: model.update(model="other"), "says that it is 'other'"),
        (lambda model: model.update(extra=1), "extra"),
        (lambda model: model["required_sources"].clear(), "required_sources"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_with_file_place_and_rule(change: Any, said: str) -> None:
    with pytest.raises(ModelError) as error:
        parse_model(MODEL, changed(change), "")
    assert str(error.value).startswith(f"{MODEL}.json: ")
    assert said in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"1", b"null", b"1" * 5000])
def test_what_is_no_model_at_all_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match=f"{MODEL}.json"):
        parse_model(MODEL, content, "")


def test_a_ca_with_a_kind_of_key_unknown_here_believes_nobody() -> None:
    text, _, _ = files.kinds()["certificate"]
    sound = load_pem_x509_certificate(text.encode())
    ed25519 = bytes.fromhex("06032b6570")
    before, signed, key, after = sound.public_bytes(Encoding.DER).split(ed25519)
    unknown = load_der_x509_certificate(
        ed25519.join([before, signed]) + bytes.fromhex("06032b6530") + key + ed25519 + after
    )
    assert is_signed_by(sound, sound)
    assert not is_signed_by(sound, unknown)


def test_a_certificate_of_a_version_that_does_not_exist_is_refused() -> None:
    text, _, read = files.kinds()["certificate"]
    sound = load_pem_x509_certificate(text.encode()).public_bytes(Encoding.DER)
    version = bytes.fromhex("a003020102")
    assert version in sound
    changed = base64.encodebytes(sound.replace(version, bytes.fromhex("a003020112"), 1)).decode()
    with pytest.raises(Refused, match="holds no certificate"):
        read(f"-----BEGIN CERTIFICATE-----\n{changed}-----END CERTIFICATE-----\n".encode())
