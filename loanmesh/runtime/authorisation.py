"""Who may call what, and for which lender: one table, read from YAML, asked before a request is looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from loanmesh.runtime.caller import CALLERS_REMEMBERED, STRANGER, Caller
from loanmesh.runtime.errors import NotAllowed, Unauthenticated
from loanmesh.runtime.plain_yaml import WrongYaml, read_yaml
from loanmesh.runtime.setting_rules import WrongSetting

SECTIONS = ("roles", "methods", "lenders")
ANYBODY = "*"
"""The pattern that needs no proof of who calls."""
_OF_LENDERS = "lending.intake."
"""Methods whose requests are each about one lender, in `parent` or `name`, or about several, in `names`."""
_ALL = "lenders/*"
"""What a request is about that names no lender: for those who may act for all."""
SHIPPED = "loanmesh/runtime/access.yaml"


class BadTable(Exception):
    """A table cannot be used; the text says where and why."""


@dataclass(frozen=True)
class Table:
    """Patterns of callers by method, and of lenders by pattern of caller."""

    methods: Mapping[str, Sequence[str]]
    """`package.Service/Method` or `package.Service/*` to patterns."""
    lenders: Mapping[str, Sequence[str]]

    def callers(self, method: str) -> Sequence[str]:
        """Patterns of those who may call it; the method's own line goes before its service's."""
        own = self.methods.get(method)
        return self.methods.get(f"{method.rsplit('/', 1)[0]}/*", ()) if own is None else own


class Authorisation:
    """Answers from a table; each answer is worked out once.

    namespace  of the service that asks: `sa/NAME` means one of it.
    """

    def __init__(self, table: Table, namespace: str) -> None:
        self._table = table
        self._namespace = namespace
        self._may_call = lru_cache(CALLERS_REMEMBERED)(self._look_up_method)
        self._may_act = lru_cache(CALLERS_REMEMBERED)(self._look_up_lender)

    def check_method(self, caller: Caller, method: str) -> None:
        """Raises Unauthenticated for a stranger where somebody is wanted, NotAllowed for somebody else."""
        if self._may_call(caller.path, method):
            return
        if caller is STRANGER:
            raise Unauthenticated(
                "nobody is proven to call: show a certificate of this mesh, or send a token", reason="NO_IDENTITY"
            )
        raise NotAllowed(f"{caller.path} may not call {method}", reason="METHOD_NOT_ALLOWED")

    def check_lender(self, caller: Caller, method: str, request: Any) -> None:
        """Raises NotAllowed where a request to intake is about a lender that the caller may not act for."""
        if not method.startswith(_OF_LENDERS):
            return
        one = str(getattr(request, "parent", "") or getattr(request, "name", ""))
        names = (one,) if one else tuple(getattr(request, "names", ())) or (_ALL,)
        for lender in {"/".join(name.split("/")[:2]) for name in names}:
            if not self._may_act(caller.path, lender):
                # The same words whether there is such a lender or not.
                said = "all lenders" if lender == _ALL else lender
                raise NotAllowed(f"{caller.path} may not act for {said}", reason="LENDER_NOT_ALLOWED")

    def _look_up_method(self, path: str, method: str) -> bool:
        return any(self._matches(pattern, path) for pattern in self._table.callers(method))

    def _look_up_lender(self, path: str, lender: str) -> bool:
        return any(
            matches(wanted, lender)
            for pattern, lenders in self._table.lenders.items()
            if self._matches(pattern, path)
            for wanted in lenders
        )

    def _matches(self, pattern: str, path: str) -> bool:
        if pattern.startswith("sa/"):
            pattern = f"ns/{self._namespace}/{pattern}"
        return pattern == ANYBODY or matches(pattern, path)


def matches(pattern: str, path: str) -> bool:
    """Whether all words are the same, `*` being any one word."""
    wanted, given = pattern.split("/"), path.split("/")
    return len(wanted) == len(given) and all(w in ("*", g) for w, g in zip(wanted, given, strict=True))


def load_table(setting: str, file: str) -> Table:
    """The shipped table, with whole sections of `file` instead of its own. Raises WrongSetting."""
    if not file:
        return _table(_shipped(), SHIPPED)
    try:
        return table_of(Path(file).read_text(encoding="utf-8"), file)
    except OSError as error:
        raise WrongSetting(setting, f"{file}: {error.strerror}", "a YAML file") from error
    except (BadTable, UnicodeDecodeError) as error:
        raise WrongSetting(setting, str(error), f"sections {', '.join(SECTIONS)}, as in {SHIPPED}") from error


def table_of(text: str, file: str) -> Table:
    """The shipped table, with whole sections of the text of `file` instead of its own. Raises BadTable."""
    return _table({**_shipped(), **_sections(text, file)}, file)


def _shipped() -> dict[str, dict[str, list[str]]]:
    return _sections((resources.files("loanmesh.runtime") / "access.yaml").read_text(encoding="utf-8"), SHIPPED)


def _sections(text: str, file: str) -> dict[str, dict[str, list[str]]]:
    try:
        whole = read_yaml(text)
    except WrongYaml as error:
        raise BadTable(f"{file}{error.place}: {error}") from error
    if not isinstance(whole, dict):
        raise BadTable(f"{file}: holds no sections")
    for name, section in whole.items():
        if name not in SECTIONS:
            raise BadTable(f"{file}: unknown section {name}")
        if not isinstance(section, dict):
            raise BadTable(f"{file}: {name} holds no lines of the shape NAME: [WORD, ...]")
        for key, words in section.items():
            if not isinstance(words, list) or not all(isinstance(word, str) for word in (key, *words)):
                raise BadTable(f"{file}: {name}.{key} is no line of the shape NAME: [WORD, ...]")
    return whole


def _table(sections: Mapping[str, Mapping[str, list[str]]], file: str) -> Table:
    roles = sections["roles"]
    _check_patterns((*(p for patterns in roles.values() for p in patterns), *sections["lenders"]), file)
    methods = {}
    for method, names in sections["methods"].items():
        if "/" not in method:
            raise BadTable(f"{file}: methods.{method}: must be package.Service/Method or package.Service/*")
        if unknown := [name for name in names if name not in roles]:
            raise BadTable(
                f"{file}: methods.{method}: no such role: {', '.join(unknown)}; there are: {', '.join(roles)}"
            )
        methods[method] = tuple(pattern for name in names for pattern in roles[name])
    for caller, lenders in sections["lenders"].items():
        if wrong := [word for word in lenders if not word.startswith("lenders/")]:
            raise BadTable(f"{file}: lenders.{caller}: {', '.join(wrong)}: must be lenders/NAME or lenders/*")
    return Table(methods, sections["lenders"])


def _check_patterns(patterns: Iterable[str], file: str) -> None:
    for pattern in patterns:
        match pattern.split("/"):
            case [("client" | "operator" | "sa"), _] | ["ns", _, "sa", _] | ["*"]:
                continue
        raise BadTable(
            f"{file}: {pattern}: must be client/NAME, operator/NAME, sa/NAME, ns/NAMESPACE/sa/NAME, with * for any word"
        )
