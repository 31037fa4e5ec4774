"""Requests gone wrong: a valid one changed in its fields or in its bytes, or one made up from the contract alone.

All is drawn from the dice handed in, so that a request can be made again from its seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from lab.fuzz import odd

DEPTH_MAX = 6
"""How deep made-up messages are; nesting beyond that is done in bytes."""
_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


def request(examples: Sequence[Message], dice: random.Random) -> bytes:
    """One request's bytes."""
    example = dice.choice(examples)
    made = type(example)()
    kind = dice.random()
    if kind < 0.08:
        return example.SerializeToString()
    if kind < 0.2:
        _make_up(made, dice, 0)
        return made.SerializeToString()
    made.CopyFrom(example)
    if kind < 0.45:
        # Plausible, so that it passes the contract's rules and meets the code behind them.
        for _ in range(dice.choice([1, 2, 4])):
            _nudge(made, dice)
        return made.SerializeToString()
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        _change(made, dice)
    data = made.SerializeToString()
    if kind < 0.75:
        return data
    for _ in range(dice.choice([1, 1, 2, 5])):
        data = dice.choice(_SPOILED)(data, dice)
    return data


# --- Fields ---


def _change(message: Message, dice: random.Random) -> None:
    """Change one field, here or somewhere below."""
    here: Any = message
    set_ = [field for field, _ in message.ListFields()]
    choices = set_ if set_ and dice.random() < 0.8 else message.DESCRIPTOR.fields
    if not choices:
        return
    field: Any = dice.choice(choices)
    if _is_message(field) and not _is_map(field) and dice.random() < 0.75:
        below = getattr(here, field.name)
        if not field.is_repeated:
            _change(below, dice)
        elif below:
            _change(dice.choice(list(below)), dice)
        else:
            _change(below.add(), dice)
    elif dice.random() < 0.2:
        message.ClearField(field.name)
    elif field.is_repeated and not _is_map(field) and len(getattr(here, field.name)) and dice.random() < 0.4:
        several = getattr(here, field.name)
        # Over the limits of lists, too.
        several.extend(list(several) * dice.choice([1, 2, 60, 300]))
        del several[600:]
    else:
        _set(message, field, dice, DEPTH_MAX - 2)


def _nudge(message: Message, dice: random.Random) -> None:
    """Change one value that is set, here or below, to a near one of the same kind."""
    set_: list[tuple[Any, Any]] = [(field, value) for field, value in message.ListFields() if not _is_map(field)]
    if not set_:
        return
    field, value = dice.choice(set_)
    if _is_message(field):
        if not field.is_repeated:
            _nudge(value, dice)
        elif dice.random() < 0.15:
            del value[dice.randrange(len(value))]
        else:
            _nudge(dice.choice(list(value)), dice)
    elif field.is_repeated:
        value.append(dice.choice(list(value)))
    else:
        low, high = _RANGES.get(field.cpp_type, (0, 0))
        match value:
            case bool():
                near: Any = not value
            case int():
                near = max(low, min(high, dice.choice([value + 1, value - 1, value * 2, value // 2, value * 1000, 0])))
            case float():
                near = dice.choice([value * 1.0001, -value, value * 1e6, 0.0, 1.0, odd.number(dice)])
            case str():
                near = dice.choice([value[:-1], value + value[-1:], value.upper(), value[::-1]])
            case _:
                near = value[:-1]
        setattr(message, field.name, near)


def _make_up(message: Message, dice: random.Random, depth: int) -> None:
    """Fill a message with whatever its fields can hold."""
    fields: Sequence[Any] = message.DESCRIPTOR.fields
    for field in fields:
        if dice.random() < 0.5:
            _set(message, field, dice, depth)


def _set(message: Message, field: FieldDescriptor, dice: random.Random, depth: int) -> None:
    here: Any = message
    if _is_map(field):
        return  # No request has one; their keys would need care of their own.
    if field.is_repeated:
        several = getattr(here, field.name)
        for _ in range(dice.randrange(4)):
            if not _is_message(field):
                several.append(_value(field, dice))
            elif depth < DEPTH_MAX:
                _make_up(several.add(), dice, depth + 1)
    elif not _is_message(field):
        setattr(here, field.name, _value(field, dice))
    else:
        getattr(here, field.name).SetInParent()
        if depth < DEPTH_MAX:
            _make_up(getattr(here, field.name), dice, depth + 1)


def _value(field: FieldDescriptor, dice: random.Random) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return dice.random() < 0.5
        case FieldDescriptor.CPPTYPE_STRING:
            return odd.octets(dice) if field.type == FieldDescriptor.TYPE_BYTES else odd.text(dice)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return odd.number(dice)
        case FieldDescriptor.CPPTYPE_FLOAT:
            return dice.choice([0.0, -1.0, 3.4e38, float("nan"), float("inf")])
        case FieldDescriptor.CPPTYPE_ENUM if dice.random() < 0.7:
            assert field.enum_type
            return dice.choice([value.number for value in field.enum_type.values])
    return odd.integer(dice, *_RANGES[field.cpp_type])


def _is_message(field: FieldDescriptor) -> bool:
    return field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


# --- Bytes ---


def _cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data) + 1)]


def _flipped(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 3, 10])):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _with_junk(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data) + 1)
    return data[:at] + odd.octets(dice) + data[at:]


def _twice(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data) + 1)
    return data + data[at:]


def _with_unknown_fields(data: bytes, dice: random.Random) -> bytes:
    """Fields that no contract knows: to be carried or left, not to be tripped over."""
    for _ in range(dice.randrange(1, 5)):
        number = dice.choice([24, 39, 100, 19_000, 536_870_911])
        data += _varint(number << 3 | 2) + _varint(12) + dice.randbytes(12)
    return data


def _deep(data: bytes, dice: random.Random) -> bytes:
    """A field within itself, hundreds of times."""
    number, nested = dice.choice([1, 2, 3, 4, 5, 100]), b""
    for _ in range(dice.choice([20, 90, 110, 500])):
        nested = _varint(number << 3 | 2) + _varint(len(nested)) + nested
    return data + nested


def _long_length(data: bytes, dice: random.Random) -> bytes:
    """A length that promises more than there is."""
    return data + _varint(dice.randrange(1, 30) << 3 | 2) + _varint(dice.choice([2**31 - 1, 2**32, 2**63])) + b"x"


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


_SPOILED: Sequence[Callable[[bytes, random.Random], bytes]] = (
    _cut, _flipped, _flipped, _with_junk, _twice, _with_unknown_fields, _deep, _long_length,
)  # fmt: skip


def readable(message: type[Message], data: bytes) -> Message | None:
    """The request as the server reads it; None where it cannot."""
    try:
        return message.FromString(data)
    except DecodeError:
        return None
