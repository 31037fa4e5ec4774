"""Degradation steps: taken at once, given up only after calm, by the clock alone."""

from __future__ import annotations

import pytest

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.degradation import Load, Step, StepSettings


class Pressed:
    """A step under a load that the test sets."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.share = 0.0
        self.told: list[tuple[str, bool]] = []
        settings = StepSettings(enter_at=0.5, leave_below=0.1, calm_s=2)
        self.step = Step("serve_cached", "court", settings, lambda: Load(self.share, f"load {self.share}"), self.clock,
                         lambda step, in_force: self.told.append((step.name, in_force)))  # fmt: skip

    def at(self, share: float, after_s: float = 0.0) -> bool:
        self.clock.advance(after_s)
        self.share = share
        return self.step.check()


def test_it_is_taken_at_the_mark_and_remembers_since_when_and_why() -> None:
    pressed = Pressed()
    assert not pressed.at(0.49)
    assert pressed.at(0.5, after_s=1)
    assert (pressed.step.since, pressed.step.cause) == (pressed.clock.now(), "load 0.5")
    since = pressed.step.since
    assert pressed.at(0.9, after_s=1)
    assert (pressed.step.since, pressed.step.cause) == (since, "load 0.5")


def test_between_the_marks_it_stays_as_it_is() -> None:
    pressed = Pressed()
    assert not pressed.at(0.3)
    pressed.at(1.0)
    for _ in range(10):
        assert pressed.at(0.3, after_s=1)


def test_it_is_given_up_after_calm_without_a_break() -> None:
    pressed = Pressed()
    pressed.at(1.0)
    assert pressed.at(0.0, after_s=1)
    assert pressed.at(0.0, after_s=1.9)
    assert pressed.at(0.2, after_s=0.05)  # A break: the calm begins anew.
    assert pressed.at(0.0, after_s=5)
    assert not pressed.at(0.0, after_s=2)
    assert pressed.told == [("serve_cached", True), ("serve_cached", False)]
    assert pressed.at(0.5)


def test_a_load_about_one_mark_does_not_make_it_flap() -> None:
    pressed = Pressed()
    for number in range(100):
        pressed.at(0.45 if number % 2 else 0.55, after_s=0.1)
    assert len(pressed.told) == 1


def test_marks_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="flap"):
        StepSettings(enter_at=0.1, leave_below=0.5)
