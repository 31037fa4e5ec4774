"""What one replica of each service does, from the measured cost of an application: data, with date and machine."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from loanmesh.promotion.wrong import WrongFile, read_yaml

Service = Literal["intake", "intake-worker", "bureau", "scoring", "pricing"]
SERVICES: tuple[Service, ...] = ("intake", "intake-worker", "bureau", "scoring", "pricing")
STAGES: tuple[Service, ...] = ("intake-worker", "bureau", "scoring", "pricing")
"""What an application passes to be decided. Intake only accepts it."""
_LEAST_MS = 0.01
"""A cost is never taken for less: ticks of 10 ms over a thousand applications measure no finer."""
_ACCEPTS, _COLD, _WARM = "accepts one by one", "one by one, cold", "one by one, warm"


class Cost(BaseModel, frozen=True, extra="forbid"):
    """CPU of one application in one service, milliseconds."""

    cold: Annotated[float, Field(gt=0)]
    """All of its evidence is asked for anew."""
    warm: Annotated[float, Field(gt=0)]
    """All of it is in the cache."""


class Capacity(BaseModel, frozen=True, extra="forbid"):
    """What was measured, when and where."""

    measured_on: dt.date
    machine: str
    cpu_ms: dict[Service, Cost]

    def a_second(self, service: Service, new_subjects: float) -> float:
        """Applications that one replica with a core to itself handles a second.

        new_subjects  share of the applications whose evidence is asked for anew, in [0, 1].
        """
        cost = self.cpu_ms[service]
        return 1000 / (cost.cold * new_subjects + cost.warm * (1 - new_subjects))


def read_capacity(path: Path | None = None) -> Capacity:
    """From a file; without one, what is shipped. Raises WrongFile."""
    path = path or Path(str(resources.files("loanmesh.promotion") / "capacity.yaml"))
    capacity = read_yaml(path, Capacity)
    if missing := set(SERVICES) - set(capacity.cpu_ms):
        raise WrongFile(path, [f"cpu_ms: {', '.join(sorted(missing))} is missing"])
    return capacity


def from_bench(path: Path) -> Capacity:
    """The costs that `make bench` found, from its build/bench.json. Raises WrongFile."""
    try:
        bench: Any = json.loads(path.read_text(encoding="utf-8"))
        measured_on = dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC).date()
    except OSError as error:
        raise WrongFile(path, [f"cannot be read: {error.strerror}; `make bench ONLY=core` writes it"]) from error
    except ValueError as error:
        raise WrongFile(path, ["is no JSON; `make bench ONLY=core` writes it"]) from error
    try:
        if bench["quick"]:
            raise WrongFile(path, ["comes from a quick run, whose times mean nothing; `make bench ONLY=core`"])
        core, machine = bench["measured"]["core"], bench["machine"]
        accept_ms = float(core[_ACCEPTS]["cpu_ms"]["intake"])
        cold, warm = ({k: float(v) for k, v in core[round_]["cpu_ms"].items()} for round_ in (_COLD, _WARM))
        costs: dict[Service, Cost] = {"intake": Cost(cold=accept_ms, warm=accept_ms)}
        # Intake both accepted and decided there.
        costs["intake-worker"] = _cost(cold["intake"] - accept_ms, warm["intake"] - accept_ms)
        for name in STAGES[1:]:
            costs[name] = _cost(cold[name], warm[name])
        words = f"{machine['cores']} cores, {machine['kind']}, Python {machine['python']}"
    except (KeyError, TypeError, AttributeError) as error:
        raise WrongFile(path, [f"has no {error}; `make bench ONLY=core` writes what is needed"]) from error
    return Capacity(measured_on=measured_on, machine=words, cpu_ms=costs)


def _cost(cold_ms: float, warm_ms: float) -> Cost:
    return Cost(cold=round(max(_LEAST_MS, cold_ms), 3), warm=round(max(_LEAST_MS, warm_ms), 3))


def as_yaml(capacity: Capacity) -> str:
    """The file's text."""
    said: Mapping[str, Any] = capacity.model_dump()
    costs = "".join(f"  {name}: {{cold: {c['cold']:g}, warm: {c['warm']:g}}}\n" for name, c in said["cpu_ms"].items())
    head = yaml.safe_dump({"measured_on": capacity.measured_on, "machine": capacity.machine}, sort_keys=False)
    return (
        "# What one application costs each service, CPU milliseconds; written by"
        " `loanmesh promotion capacity build/bench.json`.\n"
        "# Cold: all of its evidence is asked for anew. Warm: all of it is in bureau's cache.\n"
        f"{head}cpu_ms:\n{costs}"
    )
