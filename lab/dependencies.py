"""What we are built of: known vulnerabilities, licences, and files that two packages claim.

    python -m lab.dependencies audit       ask the advisory database about every locked package
    python -m lab.dependencies licences    write docs/licences.md

An audit that could not ask says so: "not audited" is not "no vulnerabilities". It fails on a vulnerability only, so
that it may run where there is no way out; `--must` fails where anything was left unasked, too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

LOCK = Path("requirements/dev.txt")
RUNTIME = Path("requirements/runtime.txt")
PAGE = Path("docs/licences.md")
AUDIT_S = 300.0
NAMES = {
    "Apache": "Apache-2.0", "Apache License 2.0": "Apache-2.0", "Apache Software License": "Apache-2.0",
    "MIT License": "MIT", "BSD License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC", "Python Software Foundation License": "PSF-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0", "The Unlicense (Unlicense)": "Unlicense",
}  # fmt: skip
"""What packages call their licence, and its SPDX name."""
PERMISSIVE = frozenset({
    "Apache-2.0", "MIT", "MIT-0", "MIT-CMU", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "PSF-2.0", "Zlib",
    "CC0-1.0", "Unlicense",
})  # fmt: skip
COPYLEFT = {
    "MPL-2.0": "file by file: changes to its own files must be published, what uses it is free. We change none.",
}
"""Allowed, and named: each with what it asks of us. What is in neither set is not allowed."""


@dataclass(frozen=True)
class Package:
    """One package of the lock, as it is installed here."""

    name: str
    version: str
    licence: str
    """SPDX names, joined as its authors join them."""
    ships: bool
    """Whether it is in a service's image; else only who builds or tests needs it."""

    @property
    def parts(self) -> frozenset[str]:
        """Names of its licences."""
        return frozenset(re.split(r" AND | OR |; ", self.licence))

    @property
    def copyleft(self) -> bool:
        """Whether it asks something of who changes it."""
        return bool(self.parts & COPYLEFT.keys())


def locked(lock: Path = LOCK) -> dict[str, str]:
    """Version by name, as pip compares names."""
    found = re.findall(
        r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)", lock.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {_plain(name): version for name, version in found}


def packages() -> list[Package]:
    """The locked packages that are installed here, by name. Some are for other platforms only."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=json"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    known, runtime = locked(), locked(RUNTIME)
    found = [
        Package(one["Name"], one["Version"], _spdx(one["License"]), _plain(one["Name"]) in runtime)
        for one in told
        if _plain(one["Name"]) in known
    ]
    return sorted(found, key=lambda package: package.name.lower())


def not_allowed(found: Sequence[Package]) -> list[str]:
    """What no rule of ours allows, one line each."""
    allowed = PERMISSIVE | COPYLEFT.keys()
    return [f"{one.name}: {one.licence}" for one in found if not one.parts <= allowed]


def page(found: Sequence[Package]) -> str:
    """docs/licences.md."""
    lines = [
        "# Licences",
        "",
        "Written by `make licences`; a test compares it with what is installed.",
        f"Allowed: {', '.join(sorted(PERMISSIVE))}; and, named here, what asks something of who changes it:",
        "",
    ]
    for name, asks in COPYLEFT.items():
        lines.append(f"* **{name}**, {asks} {', '.join(one.name for one in found if name in one.parts)}.")
    lines += ["", "| Package | Licence | Where |", "|---|---|---|"]
    for one in found:
        licence = f"{one.licence} (copyleft)" if one.copyleft else one.licence
        lines.append(f"| {one.name} | {licence} | {'services' if one.ships else 'build and test'} |")
    return "\n".join(lines) + "\n"


def claimed_twice() -> dict[str, list[str]]:
    """Files that two locked packages brought, and which: the second to be installed overwrote the first."""
    owners: Mapping[str, list[str]] = defaultdict(list)
    known = locked()
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if _plain(name) in known:
            for file in distribution.files or ():
                # Scripts and caches lie outside, or are made anew.
                if not str(file).startswith("..") and "__pycache__" not in file.parts:
                    owners[str(file)].append(name)
    return {file: names for file, names in owners.items() if len(names) > 1}


# --- Vulnerabilities ---


@dataclass(frozen=True)
class Audit:
    """What the advisory database said."""

    asked: int
    vulnerable: Sequence[str]
    skipped: Sequence[str]
    """Packages about which nobody could be asked, with the reason."""
    failed: str = ""
    """Why there is no answer at all; '' where there is one."""

    @property
    def told(self) -> str:
        """In one line."""
        if self.failed:
            return f"NOT AUDITED: {self.failed}"
        if self.vulnerable:
            return f"{len(self.vulnerable)} vulnerabilities in {self.asked} packages"
        if self.skipped:
            total = self.asked + len(self.skipped)
            return f"NOT AUDITED: {len(self.skipped)} of {total} packages are unknown to the advisory database here"
        return f"no known vulnerabilities in {self.asked} packages"

    @property
    def complete(self) -> bool:
        """Whether every package was asked about."""
        return not self.failed and not self.skipped and self.asked > 0


def audit(run: Any = subprocess.run) -> Audit:
    """Ask pip-audit about the lock. Its own verdict counts what it skipped as well; so its answer is read."""
    command = [
        sys.executable, "-m", "pip_audit", "-r", str(LOCK), "--disable-pip", "--require-hashes", "--format", "json",
        "--progress-spinner", "off",
    ]  # fmt: skip
    try:
        done = run(command, capture_output=True, text=True, check=False, timeout=AUDIT_S)
    except subprocess.TimeoutExpired:
        return Audit(0, (), (), f"no answer within {AUDIT_S:g} s")
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        return Audit(0, (), (), f"no advisory database could be asked: {last[:200]}")
    return read(told)


def read(told: Sequence[Mapping[str, Any]]) -> Audit:
    """What pip-audit's answer means."""
    vulnerable = [
        f"{one['name']} {one['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'nothing yet'}"
        for one in told
        for found in one.get("vulns", ())
    ]
    skipped = [f"{one['name']}: {one['skip_reason']}" for one in told if "skip_reason" in one]
    return Audit(len(told) - len(skipped), vulnerable, skipped)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _spdx(said: str) -> str:
    return "; ".join(NAMES.get(part, part) for part in said.split("; "))


def main() -> None:
    """Read the command line, do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("audit", "licences"))
    parser.add_argument("--must", action="store_true", help="fail where anything could not be asked")
    asked = parser.parse_args()
    if asked.what == "audit":
        answer = audit()
        for line in (*answer.vulnerable, *answer.skipped[:3]):
            print(line)
        print(answer.told)
        sys.exit(bool(answer.vulnerable) or (asked.must and not answer.complete))
    found = packages()
    if wrong := not_allowed(found):
        print("not allowed: " + "; ".join(wrong), file=sys.stderr)
        sys.exit(1)
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE}: {len(found)} packages, {sum(one.copyleft for one in found)} of them copyleft")


if __name__ == "__main__":
    main()
