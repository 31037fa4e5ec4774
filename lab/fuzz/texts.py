"""Files gone wrong: YAML and JSON changed in their lines, their values or their bytes."""

from __future__ import annotations

import base64
import copy
import json
import random
import re
from typing import Any

from lab.fuzz import odd

_SCALARS = (
    "null",
    "~",
    "[]",
    "{}",
    "''",
    "x",
    "-1",
    "0",
    "1e309",
    ".nan",
    ".inf",
    "-.inf",
    "true",
    "2026-13-45",
    "2026-11-25",
    "0x7fffffffffffffffffffffff",
    "1" * 5000,
    "!!python/object/apply:os.getpid []",
    "!!binary x",
    "!unknown 1",
    "&a [*a]",
    "*nobody",
    "{a: 1, a: 2}",
    "[[[[[[[[[[1]]]]]]]]]]",
    "? [1, 2] : 3",
    "|",
    "<<: 1",
    "1_000",
    "1:30",
    "贷款",
    "\\x00",
    '"\\ud800"',
    "[" * 1200,
    "{a: " * 1200,
    "1 + " * 12_000 + "1",
)
_PEM = re.compile(r"-----BEGIN [A-Z ]+-----\n(.*?)-----END", re.DOTALL)
_VALUE = re.compile(r"(:\s+|-\s+|\[|,\s*)([^\s\[\]{},#:][^\[\]{},#\n]*)")
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", "x", odd.PLANTED, [], {}, [[]], {"x": 1}, [None],
)  # fmt: skip


def yaml(text: str, dice: random.Random) -> bytes:
    """YAML, odd in one to three places."""
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        text = dice.choice((_other_value, _other_value, _other_value, _other_lines, _other_key))(text, dice)
    data = text.encode("utf-8", "replace")
    return data if dice.random() < 0.85 else spoiled(data, dice)


def json_file(text: str, dice: random.Random) -> bytes:
    """JSON, odd in one to three places."""
    whole = json.loads(text)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        _change(whole, dice)
    data = json.dumps(whole).encode()
    return data if dice.random() < 0.85 else spoiled(data, dice)


def pem(text: str, dice: random.Random) -> bytes:
    """PEM with its lines changed, or with other bytes in what one of its blocks holds."""
    if dice.random() < 0.3:
        return spoiled(_other_lines(text, dice).encode(), dice)
    block = dice.choice(list(_PEM.finditer(text)))
    content = bytearray(base64.b64decode(block[1]))
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(content))
        match dice.randrange(3):
            case 0:
                content[at] ^= 1 << dice.randrange(8)
            case 1:
                content[at] = dice.choice([0, 1, 0x30, 0x7F, 0x80, 0x84, 0xFF])
            case _:
                del content[at : at + dice.randrange(1, 4)]
    return (text[: block.start(1)] + base64.encodebytes(bytes(content)).decode() + text[block.end(1) :]).encode()


def spoiled(data: bytes, dice: random.Random) -> bytes:
    """Cut, with bits flipped, or with junk in the middle."""
    at = dice.randrange(len(data) + 1)
    match dice.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + odd.octets(dice) + data[at:]
        case 2:
            return b"[" * 100_000
        case _:
            changed = bytearray(data or b"x")
            for _ in range(5):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            return bytes(changed)


def _other_value(text: str, dice: random.Random) -> str:
    places = list(_VALUE.finditer(text))
    if not places:
        return text + dice.choice(_SCALARS)
    place = dice.choice(places)
    other = dice.choice(places)[2] if dice.random() < 0.3 else dice.choice(_SCALARS)
    return text[: place.start(2)] + other + text[place.end(2) :]


def _other_key(text: str, dice: random.Random) -> str:
    keys = list(re.finditer(r"^(\s*(?:- )?)([A-Za-z_][\w.]*)(?=:)", text, re.MULTILINE))
    if not keys:
        return text
    key = dice.choice(keys)
    other = dice.choice([key[2] + "x", key[2].upper(), "1", "null", dice.choice(keys)[2], odd.PLANTED])
    return text[: key.start(2)] + other + text[key.end(2) :]


def _other_lines(text: str, dice: random.Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    at = dice.randrange(len(lines))
    match dice.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[dice.randrange(len(lines))])
        case 2:
            lines[at] = " " * dice.choice([1, 2, 4]) + lines[at]
        case 3:
            lines[at] = "\\t" + lines[at].lstrip(" ")
        case _:
            del lines[at : at + dice.randrange(1, 20)]
    return "".join(lines)


def _change(whole: Any, dice: random.Random) -> None:
    """Change one value somewhere below."""
    here = whole
    while True:
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        if not keys:
            return
        key = dice.choice(list(keys))
        if isinstance(here[key], dict | list) and here[key] and dice.random() < 0.85:
            here = here[key]
            continue
        match dice.randrange(6):
            case 0:
                del here[key]
            case 1 if isinstance(here, dict):
                here[odd.PLANTED] = copy.deepcopy(here[key])
            case 2 if isinstance(here, list):
                here.append(copy.deepcopy(here[key]))
            case 3 if isinstance(here[key], int | float) and abs(here[key]) < 1e300:
                here[key] = dice.choice([-here[key], here[key] * 1e9, here[key] + 1])
            case _:
                here[key] = copy.deepcopy(dice.choice(_VALUES))  # A later change must not change the values.
        return
