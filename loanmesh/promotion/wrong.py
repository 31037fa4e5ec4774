"""A file that cannot be used, said so that its author can mend it: field, value, rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from loanmesh.runtime import plain_yaml

M = TypeVar("M", bound=BaseModel)
SHOWN_MAX = 60
"""Characters of a wrong value that are shown."""
FILE_BYTES_MAX = 1_000_000


class WrongFile(Exception):
    """A file is not what it should be; one line a problem."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.problems = tuple(problems)


def read_yaml(path: Path, kind: type[M]) -> M:
    """The file as a model. Raises WrongFile with every problem that it has."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise WrongFile(path, [f"is larger than {FILE_BYTES_MAX:,} bytes"])
        said = plain_yaml.read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise WrongFile(path, [f"cannot be read: {why}"]) from error
    except plain_yaml.WrongYaml as error:
        raise WrongFile(path, [f"{error.place.removeprefix(':')}: {error}".removeprefix(": ")]) from error
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        raise WrongFile(path, [_problem(found) for found in error.errors(include_url=False)]) from error


def _problem(found: Any) -> str:
    field = ".".join(str(part) for part in found["loc"] if part != "[key]") or "the file"
    rule = str(found["msg"]).removeprefix("Value error, ")
    if found["type"] == "missing":
        return f"{field}: is missing"
    if found["type"] in ("model_type", "dict_type"):
        return f"{field}: must be fields with values, `name: value`"
    if found["type"] == "extra_forbidden":
        return f"{field}: there is no such field"
    rule = rule.replace("Input should be ", "must be ", 1)
    value = found["input"]
    shown = "" if isinstance(value, dict | list | BaseModel) else f"is {str(value)[:SHOWN_MAX]!r}; "
    return f"{field}: {shown}{rule}"
