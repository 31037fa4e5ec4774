"""What a trial showed, step by step: what held, what did not, and what could not be tried here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

Outcome = Literal["ok", "failed", "not_tried"]


@dataclass(frozen=True)
class Line:
    """What one step showed."""

    step: str
    outcome: Outcome
    text: str


@dataclass
class Report:
    """All lines so far; each is printed as it comes, unless quiet."""

    quiet: bool = False
    lines: list[Line] = field(default_factory=list)

    def ok(self, step: str, text: str) -> None:
        """It held."""
        self._add(Line(step, "ok", text))

    def failed(self, step: str, text: str) -> None:
        """It did not."""
        self._add(Line(step, "failed", text))

    def not_tried(self, step: str, text: str) -> None:
        """It cannot be tried here; why."""
        self._add(Line(step, "not_tried", text))

    def judge(self, step: str, wrong: Sequence[str], fine: str) -> None:
        """Failed with all that is wrong, or ok."""
        if wrong:
            self.failed(step, "; ".join(wrong))
        else:
            self.ok(step, fine)

    def progress(self, text: str) -> None:
        """What is waited for."""
        if not self.quiet:
            print(f"  ... {text}", file=sys.stderr, flush=True)

    @property
    def good(self) -> bool:
        """Whether nothing failed."""
        return all(line.outcome != "failed" for line in self.lines)

    def _add(self, line: Line) -> None:
        self.lines.append(line)
        if not self.quiet:
            print(f"{line.outcome.replace('_', ' '):10}{line.step}: {line.text}", flush=True)


def summed_up(report: Report, what: str, as_json: bool) -> None:
    """Print the last words."""
    failed = [line.step for line in report.lines if line.outcome == "failed"]
    if as_json:
        steps = [asdict(line) for line in report.lines]
        print(json.dumps({"what": what, "ok": report.good, "steps": steps}, ensure_ascii=False))
    elif failed:
        print(f"{what} does not hold: {', '.join(failed)}", file=sys.stderr)
    else:
        print(f"{what} holds, as far as it could be tried here")
