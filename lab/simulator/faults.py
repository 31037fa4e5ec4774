"""What goes wrong in a run, drawn beforehand: when, what, whom. All of it ends, so that recovery can be seen."""

from __future__ import annotations

import random
from dataclasses import dataclass

from lab.population import SOURCES

INTAKE = ("intake-1", "intake-2", "intake-3")
OTHERS = ("bureau", "scoring", "pricing")
AT_PLACES = frozenset({"kill", "pause", "roll", "clock"})
"""Faults that befall one process; where it does not exist in a run, they befall nobody."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    at: float
    what: str
    """kill, pause, roll, loss, duplicates, slow_network, cut, database, slow_database, source, clock."""
    whom: str
    lasts_s: float
    how: float = 0.0
    """Callbacks until the kill or the pause; share lost; seconds a message or statement takes, or the clock jumps."""
    mood: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.whom} {self.mood} for {self.lasts_s:.2f} s ({self.how:g})"


def draw_faults(dice: random.Random, over_s: float) -> list[Fault]:
    """None in every tenth run, else up to six."""
    count = 0 if dice.random() < 0.1 else dice.randint(1, 6)
    return sorted((_draw(dice, dice.uniform(0.1, over_s)) for _ in range(count)), key=lambda fault: fault.at)


def draw_rush_faults(dice: random.Random) -> list[Fault]:
    """In most rushes intake is rolled, while its memory is full."""
    return [Fault(dice.uniform(0.8, 3.0), "roll", "intake-1", 1.0)] if dice.random() < 0.6 else []


def _draw(dice: random.Random, at: float) -> Fault:
    lasts_s = dice.uniform(0.3, 7.0)
    what = dice.choices(
        ("kill", "pause", "roll", "loss", "duplicates", "slow_network", "cut", "database", "slow_database", "source",
         "clock"),
        (5, 5, 3, 2, 1, 1, 2, 2, 1, 6, 2),
    )[0]  # fmt: skip
    match what:
        case "kill" | "pause":
            # Mostly intake: it holds the leases.
            whom = dice.choice(INTAKE) if dice.random() < 0.65 else dice.choice(OTHERS) + "-1"
            return Fault(at, what, whom, lasts_s, dice.randrange(60))
        case "roll":
            return Fault(at, what, dice.choice([*INTAKE, "bureau-1", "scoring-1", "pricing-1"]), lasts_s)
        case "loss" | "duplicates":
            return Fault(at, what, "", lasts_s, dice.uniform(0.05, 0.5))
        case "slow_network":
            return Fault(at, what, "", lasts_s, dice.uniform(0.005, 0.2))
        case "cut":
            return Fault(at, what, dice.choice(["shop", "bureau", "scoring", "pricing"]), lasts_s)
        case "database":
            return Fault(at, what, dice.choice(["intake", "intake", "bureau"]), lasts_s)
        case "slow_database":
            return Fault(at, what, dice.choice(["intake", "bureau"]), lasts_s, dice.uniform(0.01, 0.4))
        case "clock":
            whom = dice.choice([*INTAKE, "bureau-1"])
            return Fault(at, what, whom, lasts_s, dice.choice([-4000.0, -200.0, -5.0, 5.0, 60.0, 4000.0]))
        case _:
            moods = ("slow", "erring", "hanging", "garbage", "overloaded", "dead")
            return Fault(at, "source", dice.choice(SOURCES), dice.uniform(0.5, 12.0), mood=dice.choice(moods))
