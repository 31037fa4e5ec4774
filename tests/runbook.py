"""Runbooks as tests read them: commands in order, and between them the moments at which the world changes.

A block marked `sh run` is executed line by line. What stands behind `# shows: TEXT` must appear in what the command
prints, sooner or later: it is run again until it does. A block marked `sh kubectl` is compared with the manifests. A
comment `<!-- test: WORDS -->` is something that happens to the mesh. Words in capitals are filled in from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("docs/runbooks")
_PIECE = re.compile(r"```sh (?P<kind>run|kubectl)\n(?P<lines>.*?)```|<!-- test: (?P<event>.*?) -->", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command to run; `shows` must appear in what it prints."""

    line: str
    shows: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happens to the mesh at this moment, in the words of the page."""

    words: str


def steps(page: Path) -> Iterator[Command | Event]:
    """What to run and what happens, in order."""
    for piece in _PIECE.finditer(page.read_text(encoding="utf-8")):
        if piece["event"]:
            yield Event(piece["event"])
        elif piece["kind"] == "run":
            for line in piece["lines"].splitlines():
                command, _, shows = line.partition("# shows:")
                yield Command(command.strip(), shows.strip())


def kubectl_lines(page: Path) -> Iterator[str]:
    """The commands for a cluster."""
    for piece in _PIECE.finditer(page.read_text(encoding="utf-8")):
        if piece["kind"] == "kubectl":
            yield from piece["lines"].splitlines()


def filled(line: str, known: Mapping[str, str]) -> str:
    """A line with its words in capitals filled in. Longest first: BUREAU_2 is another word than BUREAU."""
    for name in sorted(known, key=len, reverse=True):
        line = re.sub(rf"\b{name}\b(?!=)", lambda _, name=name: known[name], line)  # type: ignore[misc]  # name is bound.
    return line


def unmarked(page: Path) -> list[str]:
    """Blocks of code that no test runs."""
    opened = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
    return [mark for mark in opened if mark not in ("sh run", "sh kubectl")]
