"""Results against their targets: rows for machines and for a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One figure. `target` in words, '' where there is none."""

    name: str
    value: float
    unit: str
    target: str
    met: bool


def at_most(name: str, value: float, unit: str, target: float) -> Row:
    """A figure that must not be larger."""
    return Row(name, value, unit, f"<= {target:g}", value <= target)


def at_least(name: str, value: float, unit: str, target: float) -> Row:
    """A figure that must not be smaller."""
    return Row(name, value, unit, f">= {target:g}", value >= target)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write them as JSON, and print them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    width = max(len(row.name) for row in rows)
    for row in rows:
        verdict = "" if not row.target else "met" if row.met else "MISSED"
        print(f"{row.name:{width}}  {row.value:>10g} {row.unit:12}  {row.target:>12}  {verdict}")
