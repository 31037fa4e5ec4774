"""Odd values of every kind, and the text that must never be seen again in a log."""

from __future__ import annotations

import math
import random

PLANTED = "planted-5d1f0c9e"
"""Stands in many of the odd strings. A log that holds it has echoed what a caller sent."""
INT32, INT64 = 2**31 - 1, 2**63 - 1
_STRINGS = (
    "", " ", "\x00", "\n", "\r\n", "\t", "%s%n", "{0}", "../../etc/passwd", "' OR 1=1 --", "lenders/", "lenders/demo",
    "applications/", "NaN", "true", "0", "-1", "1e309", "贷款申请", "e\u0301", "\u202e" + PLANTED, "\ufeff" + PLANTED,
    "\U0001f4b8", "\ud7ff\ue000", PLANTED, PLANTED + "\n" + PLANTED, "x" * 70, PLANTED * 700,
)  # fmt: skip


def integer(dice: random.Random, low: int, high: int) -> int:
    """One at an edge, or anywhere; within [low, high]."""
    edges = [0, 1, -1, 2, 255, 256, 65_536, low, low + 1, high, high - 1, INT32, INT32 + 1, -INT32 - 1, 10**12]
    value = dice.choice(edges) if dice.random() < 0.8 else dice.randint(low, high)
    return max(low, min(high, value))


def number(dice: random.Random) -> float:
    """Any, the ones that are none among them."""
    return dice.choice(
        [0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf, 5e-324, 1.7e308, -1.7e308, dice.uniform(-1e9, 1e9)]
    )


def text(dice: random.Random) -> str:
    """Any; always valid UTF-8, which is what protobuf lets through."""
    if dice.random() < 0.8:
        return dice.choice(_STRINGS)
    return "".join(
        chr(dice.choice([dice.randrange(32, 127), dice.randrange(0xA0, 0xD7FF)])) for _ in range(dice.randrange(40))
    )


def octets(dice: random.Random, most: int = 40) -> bytes:
    """Any bytes."""
    return dice.randbytes(dice.randrange(most))
