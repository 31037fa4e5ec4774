"""JSON that remembers where in the text each value stands. Strict, and bounded in depth and length of numbers."""

from __future__ import annotations

import json
import re
from typing import Any

Path = tuple[str | int, ...]
"""The way to a value: names in objects, places in lists; () is the whole text."""
DEPTH_MAX = 64
"""Deeper than anything an application holds, and far from the interpreter's own limit."""
DIGITS_MAX = 40
"""More than any number of an application needs, and far from where reading one gets slow."""
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_SPACE = re.compile(r"[ \t\r\n]*")
_STRINGS = json.JSONDecoder()
_WORDS = {"true": True, "false": False, "null": None}


class Malformed(Exception):
    """The text is no JSON that we take; `at` is the place, counted in characters from 0."""

    def __init__(self, at: int, why: str) -> None:
        super().__init__(why)
        self.at = at


class JsonText:
    """A JSON text, read. Raises Malformed, for a name that stands twice in an object too.

    value   what it says.
    places  for each path, where its value begins.
    names   for each path that ends in a name, where that name begins.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self.places: dict[Path, int] = {}
        self.names: dict[Path, int] = {}
        self.value, end = self._value(self._space(0), ())
        if end != len(text):
            raise Malformed(end, "something stands after the end")

    def _space(self, at: int) -> int:
        found = _SPACE.match(self._text, at)
        assert found
        return found.end()

    def _value(self, at: int, path: Path) -> tuple[Any, int]:
        """The value that begins at `at`, and where the next thing begins."""
        self.places[path] = at
        if len(path) > DEPTH_MAX:
            raise Malformed(at, f"nested deeper than {DEPTH_MAX} levels")
        match self._text[at : at + 1]:
            case "{":
                return self._object(at, path)
            case "[":
                return self._list(at, path)
            case '"':
                return self._string(at)
        for word, value in _WORDS.items():
            if self._text.startswith(word, at):
                return value, self._space(at + len(word))
        return self._number(at)

    def _object(self, at: int, path: Path) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        start = at
        at = self._space(at + 1)
        while not self._text.startswith("}", at):
            if found:
                at = self._sign(",", at, f"expected , or }} in the object that begins {self._line(start)}")
            if not self._text.startswith('"', at):
                raise Malformed(at, "expected a name in double quotes")
            name_at = at
            name, at = self._string(at)
            here = (*path, name)
            if name in found:
                first = self._line(self.names[here])
                raise Malformed(name_at, f"{json.dumps(name)} stands twice, the first {first}")
            self.names[here] = name_at
            at = self._sign(":", at, f"expected : after {json.dumps(name)}")
            found[name], at = self._value(at, here)
        return found, self._space(at + 1)

    def _list(self, at: int, path: Path) -> tuple[list[Any], int]:
        found: list[Any] = []
        start = at
        at = self._space(at + 1)
        while not self._text.startswith("]", at):
            if found:
                at = self._sign(",", at, f"expected , or ] in the list that begins {self._line(start)}")
            item, at = self._value(at, (*path, len(found)))
            found.append(item)
        return found, self._space(at + 1)

    def _string(self, at: int) -> tuple[str, int]:
        try:
            said, end = _STRINGS.raw_decode(self._text, at)
        except json.JSONDecodeError as error:
            raise Malformed(error.pos, error.msg[:1].lower() + error.msg[1:]) from error
        return str(said), self._space(end)

    def _number(self, at: int) -> tuple[int | float, int]:
        found = _NUMBER.match(self._text, at)
        if found is None:
            raise Malformed(at, "expected a value" if at < len(self._text) else "the text ends too early")
        said = found.group()
        if len(said) > DIGITS_MAX:
            raise Malformed(at, f"a number of {len(said)} characters; {DIGITS_MAX} at most")
        return float(said) if found[1] or found[2] else int(said), self._space(found.end())

    def _sign(self, sign: str, at: int, why: str) -> int:
        if not self._text.startswith(sign, at):
            raise Malformed(at, why)
        return self._space(at + 1)

    def _line(self, at: int) -> str:
        line, column = line_and_column(self._text, at)
        return f"at {line}:{column}"


def line_and_column(text: str, at: int) -> tuple[int, int]:
    """Both from 1, the column in characters."""
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
