"""The contract: lint, compatibility with what was released, and a dictionary that the code agrees with."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BUF = str(Path(sys.executable).parent / "buf")
# Not ours to name: protovalidate, Google's types, and what KEDA calls a scaler by.
LINT = (
    '{"version":"v2","lint":{"use":["STANDARD","COMMENTS"],'
    '"ignore":["buf","google","externalscaler/externalscaler.proto"]}}'
)


@pytest.fixture
def descriptors() -> str:
    return str(resources.files("lending") / "descriptors.binpb")


def test_the_contract_is_clean(descriptors: str) -> None:
    run = subprocess.run([BUF, "lint", descriptors, "--config", LINT], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_contract_breaks_no_caller(descriptors: str) -> None:
    released = str(ROOT / "protos" / "released" / "lending-v1.binpb")
    run = subprocess.run(
        [BUF, "breaking", descriptors, "--against", released], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (0, "")


def test_every_attribute_has_a_known_source_type_and_both_languages() -> None:
    dictionary = yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
    for name, attribute in dictionary["attributes"].items():
        assert attribute["source"] in dictionary["sources"], name
        assert attribute["type"] in ("integer", "number", "flag", "text"), name
        assert attribute["zh"], name
        assert attribute["en"], name


def test_no_installed_file_belongs_to_two_packages() -> None:
    owners: dict[str, str] = {}
    for package in metadata.distributions():
        for file in package.files or ():
            if str(file).startswith("..") or file.suffix != ".py":
                continue
            owner = owners.setdefault(str(file), package.name)
            assert owner == package.name, file


def test_the_generated_pages_are_up_to_date() -> None:
    from lab.contract_pages import pages

    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: make docs"
