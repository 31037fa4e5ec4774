"""What all sections share: what was asked for, the rows they hand back, and how rows and tables are printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import Cores
from loanmesh.runtime.clock import Clock


@dataclass(frozen=True)
class Row:
    """One figure, and what it should be. `met` is None where nothing is asked of it."""

    name: str
    value: float
    unit: str
    target: str | None = None
    met: bool | None = None
    timed: bool = True
    """Whether it depends on how fast this machine is; False for counts, which even a quick run judges."""


def at_most(name: str, value: float, unit: str, limit: float, *, timed: bool = True) -> Row:
    """A figure that may not be higher."""
    return Row(name, value, unit, f"<= {limit:g}", value <= limit, timed)


def at_least(name: str, value: float, unit: str, limit: float, *, timed: bool = True) -> Row:
    """A figure that may not be lower."""
    return Row(name, value, unit, f">= {limit:g}", value >= limit, timed)


@dataclass(frozen=True)
class Found:
    """What a section found: rows for the verdict, markdown for people, everything measured for machines."""

    rows: Sequence[Row]
    markdown: Sequence[str] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """One run: how long, from which seed, on which cores, and where things go."""

    quick: bool
    seed: int
    clock: Clock
    cores: Cores
    pictures: Path
    say: Callable[[str], None]

    def size(self, full: int, quick: int) -> int:
        """A count or a number of seconds, by how long the run may take."""
        return quick if self.quick else full


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, padded so that it reads well unrendered too."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in cells]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    words = {True: "yes", False: "**no**", None: ""}
    shown = [(row.name, figure(row.value), row.unit, row.target or "", words[row.met]) for row in rows]
    return table(("what", "found", "unit", "target", "met"), shown)


def figure(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as build/bench.json holds them."""
    return [{**asdict(row), "value": round(row.value, 4)} for row in rows]
