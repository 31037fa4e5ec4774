"""The sources: what each may state, and how long its word counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

DAY_S = 86_400.0
PartyKind = Literal["person", "firm"]
# Own policy: how fast each kind of fact changes. Fresh: a decline may rest on it. Usable: an approval may.
_FRESH_FOR_S = {
    "central_bank": DAY_S, "tax": 3 * DAY_S, "registry": 7 * DAY_S, "court": DAY_S, "bank_flow": DAY_S,
}  # fmt: skip
_USABLE_FACTOR = 7


class Garbage(Exception):
    """A source answered what it may not; the text names the source or the fact, never its value."""


@dataclass(frozen=True)
class Source:
    """One source of evidence."""

    id: str
    fresh_for_s: float
    usable_for_s: float
    types: Mapping[PartyKind, Mapping[str, str]]
    """Per kind of party: attribute name -> integer, number, flag or text."""

    def read(self, kind: PartyKind, facts: object) -> dict[str, Any]:
        """The source's facts under dictionary names, typed. Null facts are left out. Raises Garbage."""
        if not isinstance(facts, Mapping):
            raise Garbage(f"{self.id}: the facts are no object")
        types = self.types[kind]
        known: dict[str, Any] = {}
        for name, value in facts.items():
            if name not in types:
                raise Garbage(f"{self.id} stated an attribute of a {kind} that it may not")
            if value is None:
                continue
            known[name] = _typed(name, types[name], value)
        return known


def _typed(name: str, type_: str, value: Any) -> Any:
    match type_, value:
        case "flag", bool():
            return value
        case "integer", int() if not isinstance(value, bool) and abs(value) < 2**62:
            return value
        case "number", int() | float() if not isinstance(value, bool) and abs(value) < 1e18:
            return float(value)
        # Not printable: half a surrogate pair, say, which no protobuf text can carry.
        case "text", str() if len(value) <= 100 and value.isprintable():
            return value
    raise Garbage(f"{name} is no {type_}")


def load_sources() -> dict[str, Source]:
    """The sources of the attribute dictionary, in its order."""
    dictionary = yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
    kinds: tuple[PartyKind, ...] = ("person", "firm")
    return {
        source: Source(
            source,
            _FRESH_FOR_S[source],
            _FRESH_FOR_S[source] * _USABLE_FACTOR,
            {
                kind: {
                    name: a["type"]
                    for name, a in dictionary["attributes"].items()
                    if a["source"] == source and kind in a["of"]
                }
                for kind in kinds
            },
        )
        for source in dictionary["sources"]
    }
