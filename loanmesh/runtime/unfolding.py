"""What a message's bytes unfold to, counted before it is parsed.

Two bytes can be a message of a hundred: eight megabytes of them come to 460, which a replica does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from google.protobuf.descriptor import Descriptor

COUNTED_FROM_BYTES = 1_000_000
"""Shorter messages are not counted: they unfold to 60 MB at most. A batch of usual applications has a tenth."""
FIELDS_MAX = 250_000
"""Fields, all levels together. Five hundred usual applications have 25,000, with ten parties and fifty consents each
200,000. Counting so many takes 0.3 s; they unfold to 30 MB."""


def is_too_much(data: bytes, kind: Descriptor) -> bool:
    """Whether a message of that kind has more fields than any sound one."""
    if len(data) < COUNTED_FROM_BYTES:
        return False
    return fields(data, kind, FIELDS_MAX) > FIELDS_MAX


def fields(data: bytes, kind: Descriptor, most: int) -> int:
    """How many fields there are, all levels together; counting ends beyond `most`, and where the bytes are no message,
    which the parser tells."""
    count = 0
    waiting = [(0, len(data), kind)]
    while waiting:
        at, end, here = waiting.pop()
        below = _below(here)
        while at < end:
            count += 1
            if count > most:
                return count
            try:
                tag, at = _varint(data, at)
                match tag & 7:
                    case 0:
                        _, at = _varint(data, at)
                    case 1:
                        at += 8
                    case 2:
                        size, at = _varint(data, at)
                        if size and (child := below.get(tag >> 3)):
                            waiting.append((at, min(at + size, end), child))
                        at += size
                    case 5:
                        at += 4
                    case 3 | 4:  # A group's fields follow, and are counted as if they stood here.
                        pass
                    case _:
                        return count
            except IndexError:
                return count
    return count


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins there, and where what follows begins."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while byte > 127 and shift < 70:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
    return value, at + 1


@lru_cache(1000)
def _below(kind: Descriptor) -> Mapping[int, Descriptor]:
    """Fields that are messages themselves, by number."""
    return {field.number: field.message_type for field in kind.fields if field.message_type is not None}
