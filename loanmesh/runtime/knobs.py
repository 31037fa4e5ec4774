"""The knobs of a settings class, one by one: name, what is allowed, what it is for."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, SecretStr
from pydantic_settings import BaseSettings

from loanmesh.runtime.setting_rules import Must


@dataclass(frozen=True)
class Knob:
    """One thing that can be set."""

    path: tuple[str, ...]
    """Where it stands in its service's section of the file, e.g. `("lease", "duration_s")`."""
    name: str
    """Its name in the environment."""
    allowed: str
    secret: bool
    json: bool
    """Whether the environment gives it as JSON."""
    owner: type[BaseModel]
    """The class whose field it is."""

    @property
    def doc(self) -> str:
        """What stands below the field in the source: unit, and what turning it does."""
        return _docs(self.owner).get(self.path[-1], "")

    def value(self, settings: BaseModel) -> Any:
        """What is in force; secrets masked."""
        value: Any = settings
        for word in self.path:
            value = getattr(value, word)
        return "***" if self.secret else value


def knobs(model: type[BaseModel], prefix: str, path: tuple[str, ...] = ()) -> Iterator[Knob]:
    """Every knob of a settings class, in the order in which it is written."""
    for field, info in model.model_fields.items():
        here, kind = (*path, field), info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from knobs(kind, prefix, here)
        else:
            name = prefix + "__".join(here).upper()
            complex_ = get_origin(kind) in (list, tuple, dict, set, frozenset)
            yield Knob(here, name, _allowed(kind, info.metadata), kind is SecretStr, complex_, model)


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The environment names a settings class understands."""
    return (knob.name for knob in knobs(model, prefix))


def _allowed(kind: Any, rules: Sequence[Any]) -> str:
    """What a field takes, in words."""
    for rule in rules:
        if isinstance(rule, Must):
            return rule.allowed
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(word) for word in get_args(kind))
    if kind in (int, float):
        words = [{int: "a whole number", float: "a number"}[kind]]
        for rule in rules:
            for type_, text, bound in (
                (Ge, "from", "ge"), (Gt, "above", "gt"), (Le, "up to", "le"), (Lt, "below", "lt"),
            ):  # fmt: skip
                if isinstance(rule, type_):
                    words.append(f"{text} {getattr(rule, bound)}")
        return " ".join(words)
    if get_origin(kind) is dict:
        return "a JSON object"
    return {str: "text", SecretStr: "text", bool: "true or false"}.get(kind, "a JSON list")


def _docs(model: type[BaseModel]) -> dict[str, str]:
    """The strings that stand below the fields of a class and of those it stands on."""
    found: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if issubclass(part, BaseModel) and part not in (BaseModel, BaseSettings):
            body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, below in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match below:
                        case ast.Expr(ast.Constant(str() as text)):
                            found[field.target.id] = inspect.cleandoc(text)
    return found
