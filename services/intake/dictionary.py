"""What intake reads in the attribute dictionary, which is part of bureau's contract."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from services.intake.explain import Label


def sources() -> tuple[str, ...]:
    """The sources that a complete profile has a report of, whatever the kind of party."""
    return tuple(_read()["sources"])


def labels() -> dict[str, Label]:
    """What attributes are called, from the dictionary that is part of the contract."""
    dictionary = _read()
    sources = dictionary["sources"]
    found = {
        name: Label(a["zh"], a["en"], a["unit"], sources[a["source"]]["zh"], sources[a["source"]]["en"])
        for name, a in dictionary["attributes"].items()
    }
    declared = ("申请人填报", "the applicant's own statement")
    found["declared.monthly_income_fen"] = Label("月收入", "monthly income", "fen", *declared)
    found["declared.dependents"] = Label("供养人数", "dependents", "count", *declared)
    found["age_years"] = Label("年龄", "age", "years", "证件", "identity document")
    return found


def _read() -> Any:
    return yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
