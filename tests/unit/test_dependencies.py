"""What we are built of: allowed licences, no file claimed twice, and an audit that calls no silence an answer."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import loanmesh
import services
from lab import dependencies
from lab.dependencies import PAGE, Package, audit, claimed_twice, locked, not_allowed, packages, read

HAVE = Package("p", "1", "MIT", True)


def answering(stdout: str, stderr: str = "", code: int = 0) -> Any:
    return lambda *_, **__: SimpleNamespace(stdout=stdout, stderr=stderr, returncode=code)


def test_every_installed_package_has_an_allowed_licence_and_stands_on_the_page() -> None:
    found = packages()
    assert len(found) > 60
    assert not_allowed(found) == []
    lines = set(PAGE.read_text(encoding="utf-8").splitlines())
    table = [line for line in dependencies.page(found).splitlines() if line.startswith("| ")]
    assert [line for line in table if line not in lines] == [], "run `make licences`"


def test_what_is_copyleft_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for one in packages():
        assert one.copyleft == (f"| {one.name} | {one.licence} (copyleft)" in page)


@pytest.mark.parametrize("licence", ["GPL-3.0-only", "UNKNOWN", "MIT AND AGPL-3.0", "Proprietary", ""])
def test_a_licence_that_no_rule_allows_is_refused(licence: str) -> None:
    assert not_allowed([HAVE, replace(HAVE, name="bad", licence=licence)]) == [f"bad: {licence}"]


def test_no_file_belongs_to_two_packages() -> None:
    assert claimed_twice() == {}


def test_the_lock_names_what_is_installed() -> None:
    known = locked()
    assert known["grpcio"] == "1.85.1"
    assert all(len(version) for version in known.values())


def test_every_core_module_can_be_imported_in_one_process() -> None:
    names: list[str] = []
    for package in (loanmesh, services):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__") and ".migrations." not in module.name:
                names.append(module.name)
    assert len(names) > 80
    done = subprocess.run(
        [sys.executable, "-c", "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)", *names],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


# --- The audit ---


WELL: Mapping[str, Any] = {"name": "a", "version": "1", "vulns": []}
ILL: Mapping[str, Any] = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED: Mapping[str, Any] = {"name": "c", "skip_reason": "not found"}


def test_silence_is_not_no_vulnerabilities() -> None:
    assert read([WELL]).told == "no known vulnerabilities in 1 packages"
    skipped = read([WELL, SKIPPED])
    assert skipped.told.startswith("NOT AUDITED: 1 of 2")
    assert not skipped.complete
    for run in (answering(""), answering("{}"), answering("", "ERROR: connection refused", 1)):
        assert audit(run).told.startswith("NOT AUDITED: ")
        assert not audit(run).complete

    def hangs(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("pip-audit", 1)

    assert audit(hangs).told.startswith("NOT AUDITED: no answer")


def test_a_vulnerability_is_told_whatever_was_skipped_besides() -> None:
    answer = audit(answering(json.dumps({"dependencies": [WELL, ILL, SKIPPED]}), code=1))
    assert answer.vulnerable == ["b 2: CVE-1, mended in 3"]
    assert answer.told == "1 vulnerabilities in 2 packages"
