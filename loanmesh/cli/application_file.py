"""An application read from JSON; what is wrong with it is told with line, column, field and what may stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from lending.intake.v1.intake_service_pb2 import Application

from loanmesh.cli import jsontext
from loanmesh.cli.jsontext import JsonText, Malformed, line_and_column

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: "a whole number of 32 bits",
    FieldDescriptor.CPPTYPE_INT64: "a whole number of 64 bits",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number from 0",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0",
}
_WORDS = {
    FieldDescriptor.CPPTYPE_DOUBLE: "a number", FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_BOOL: "true or false", FieldDescriptor.CPPTYPE_STRING: "text of whole Unicode characters",
}  # fmt: skip
_WELL_KNOWN = {
    "google.protobuf.Timestamp": "a time such as 2026-11-24T08:00:00Z",
    "google.protobuf.Duration": "seconds such as 1.5s",
}


class BadFile(Exception):
    """The file holds no application; the text begins with file, line and column."""


def read_application(file: Path) -> Application:
    """The application in a file, `-` for standard input. Raises BadFile."""
    label = "standard input" if str(file) == "-" else str(file)
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise BadFile(f"{label}: {error.strerror}") from error
    try:
        # Some editors begin a file with a byte order mark.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig")
        line, column = line_and_column(before, len(before))
        raise BadFile(f"{label}:{line}:{column}: byte {content[error.start]:#04x} is not UTF-8") from error
    try:
        read = JsonText(text)
        _check(read, read.value, Application(), ())
        return json_format.ParseDict(read.value, Application())
    except Malformed as error:
        line, column = line_and_column(text, error.at)
        raise BadFile(f"{label}:{line}:{column}: {error}") from error


def _check(read: JsonText, value: Any, message: Message, path: jsontext.Path) -> None:
    """Raise Malformed at the first field that is unknown, stands twice or cannot be; else do nothing."""
    if not isinstance(value, dict):
        what = "an application" if not path else _dotted(path)
        raise Malformed(read.places[path], f"{what} must be a JSON object, not {_shown(value)}")
    # The fast descriptors that are in use are typed apart from the plain ones.
    known: dict[str, Any] = {
        name: field for field in message.DESCRIPTOR.fields for name in (field.json_name, field.name)
    }
    told: dict[str, str] = {}
    for name, inner in value.items():
        here = (*path, name)
        field = known.get(name)
        if field is None:
            names = ", ".join(sorted({field.json_name for field in known.values()}))
            raise Malformed(read.names[here], f"there is no field {_dotted(here)}; known are {names}")
        if (other := told.setdefault(field.name, name)) != name:
            raise Malformed(read.names[here], f"{_dotted(here)} is {other}, which stands above, by another name")
        if inner is not None:
            _check_field(read, name, inner, field, message, here)
    try:
        json_format.ParseDict(value, type(message)())
    except json_format.ParseError as error:
        # What concerns no single field, as two of which only one may be set.
        raise Malformed(read.places[path], str(error)) from error


def _check_field(
    read: JsonText, name: str, value: Any, field: FieldDescriptor, message: Message, here: jsontext.Path
) -> None:
    nested = field.message_type is not None and field.message_type.full_name not in _WELL_KNOWN
    if field.is_repeated:
        if not isinstance(value, list):
            raise Malformed(read.places[here], f"{_dotted(here)} must be a list, not {_shown(value)}")
        for index, item in enumerate(value):
            if nested and item is not None:
                _check(read, item, getattr(type(message)(), field.name).add(), (*here, index))
            else:
                _try(read, {name: [item]}, item, field, message, (*here, index))
    elif nested:
        _check(read, value, getattr(type(message)(), field.name), here)
    else:
        _try(read, {name: value}, value, field, message, here)


def _try(
    read: JsonText, alone: dict[str, Any], value: Any, field: FieldDescriptor, message: Message, here: jsontext.Path
) -> None:
    try:
        json_format.ParseDict(alone, type(message)())
    except json_format.ParseError as error:
        text = f"{_dotted(here)} must be {_allowed(field)}, not {_shown(value)}"
        raise Malformed(read.places[here], text) from error


def _allowed(field: FieldDescriptor) -> str:
    if field.enum_type is not None:
        return "one of " + ", ".join(value.name for value in field.enum_type.values)
    if field.message_type is not None:
        return _WELL_KNOWN.get(field.message_type.full_name, "a JSON object")
    return _WHOLE.get(field.cpp_type) or _WORDS[field.cpp_type]


def _dotted(path: jsontext.Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    # Half a character cannot be printed; its escape can.
    return text.removeprefix(".").encode("utf-8", "backslashreplace").decode()


def _shown(value: Any) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case _:
            shown = json.dumps(value)
            return shown if len(shown) <= 60 else f"{shown[:60]}..."
