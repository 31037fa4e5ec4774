"""The breaker: opens on rates, admits only its permits, and forgets nobody's cancelled probe."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import lists, sampled_from

from loanmesh.runtime.breaker import Breaker, BreakerSettings, Change, State
from loanmesh.runtime.clock import FakeClock


def a_breaker(clock: FakeClock, **settings: Any) -> Breaker:
    base: dict[str, Any] = {"window": 10, "minimum_calls": 4, "open_s": 10, "open_s_max": 60, "jitter": 0}
    return Breaker(BreakerSettings(**{**base, **settings}), clock, random.Random(1))


def call(breaker: Breaker, *results: bool) -> None:
    """Calls one after the other; True: it failed."""
    for failed in results:
        permit = breaker.try_acquire()
        assert permit
        if failed:
            permit.fail()
        else:
            permit.succeed()


def test_it_opens_on_a_failure_rate_not_on_a_row_of_failures() -> None:
    breaker = a_breaker(FakeClock())
    call(breaker, True, True, False)
    assert breaker.state is State.CLOSED  # Too few to say.
    call(breaker, False)
    assert (breaker.state, breaker.cause) == (State.OPEN, "2 of 4 calls failed")
    assert breaker.try_acquire() is None


def test_a_rate_below_the_threshold_never_opens() -> None:
    breaker = a_breaker(FakeClock())
    for _ in range(200):
        call(breaker, False, False, True)
    assert breaker.state is State.CLOSED


def test_only_the_newest_results_count() -> None:
    breaker = a_breaker(FakeClock())
    call(breaker, *[False] * 10)
    call(breaker, *[True] * 4)
    assert breaker.state is State.CLOSED
    call(breaker, True)
    assert breaker.cause == "5 of 10 calls failed"


def test_a_minimum_above_the_window_is_read_as_the_window() -> None:
    breaker = a_breaker(FakeClock(), window=3, minimum_calls=100)
    call(breaker, True, True, True)
    assert breaker.state is State.OPEN


def test_slow_calls_open_it_even_when_they_succeed() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, slow_call_s=2, slow_rate=1)
    for _ in range(4):
        permit = breaker.try_acquire()
        assert permit
        clock.advance(2)
        permit.succeed()
    assert breaker.cause == "4 of 4 calls took 2 s or longer"


def test_half_open_admits_only_its_permits_and_begins_by_demand() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, half_open_permits=2)
    call(breaker, *[True] * 4)
    clock.advance(9.9)
    assert breaker.try_acquire() is None
    clock.advance(1000)
    assert breaker.state is State.OPEN  # Nobody asked, so nobody probed.
    permits = [breaker.try_acquire() for _ in range(200)]
    assert [permit is not None for permit in permits] == [True, True] + [False] * 198


def test_probes_that_pass_close_it_and_probes_that_fail_open_it_for_longer() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, half_open_permits=2)
    call(breaker, *[True] * 4)
    lasted = []
    for _ in range(4):
        lasted.append(breaker.retry_in_s)
        clock.advance(breaker.retry_in_s)
        call(breaker, True, True)
    assert lasted == [10, 20, 40, 60]
    clock.advance(60)
    call(breaker, False, False)
    assert breaker.state is State.CLOSED
    call(breaker, *[True] * 4)
    assert breaker.retry_in_s == 10
    assert (breaker.retry_at - clock.now()).total_seconds() == 10


def test_a_cancelled_probe_gives_its_permit_back_once() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, half_open_permits=1)
    call(breaker, *[True] * 4)
    clock.advance(10)
    permit = breaker.try_acquire()
    assert permit
    assert breaker.refuses
    permit.release()
    permit.release()
    permit.fail()
    assert breaker.state is State.HALF_OPEN
    assert [breaker.try_acquire() is not None for _ in range(2)] == [True, False]


def test_cancelled_calls_do_not_count() -> None:
    breaker = a_breaker(FakeClock())
    for _ in range(100):
        permit = breaker.try_acquire()
        assert permit
        permit.release()
    assert breaker.state is State.CLOSED


def test_a_call_begun_before_a_change_has_no_say_after_it() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, half_open_permits=1)
    early = [breaker.try_acquire() for _ in range(3)]
    call(breaker, *[True] * 4)
    clock.advance(10)
    probe = breaker.try_acquire()
    for permit in early:
        assert permit
        permit.fail()
    assert breaker.state is State.HALF_OPEN
    assert probe
    probe.succeed()
    assert [change.state for change in breaker.history] == [State.OPEN, State.HALF_OPEN, State.CLOSED]


def test_openings_are_jittered_within_their_bounds() -> None:
    lasted = set()
    for seed in range(50):
        clock = FakeClock()
        breaker = Breaker(
            BreakerSettings(minimum_calls=1, open_s=10, open_s_max=60, jitter=0.2), clock, random.Random(seed)
        )
        call(breaker, True)
        lasted.add(breaker.retry_in_s)
    assert len(lasted) > 40
    assert all(8 <= s <= 12 for s in lasted)


def test_changes_are_told() -> None:
    told: list[Change] = []
    clock = FakeClock()
    breaker = Breaker(BreakerSettings(minimum_calls=1), clock, random.Random(1), told.append)
    call(breaker, True)
    assert told == list(breaker.history)
    assert told[0].at == clock.now()


@pytest.mark.parametrize("changed", [{"failure_rate": 0}, {"failure_rate": 1.1}, {"window": 0}, {"open": 3}])
def test_impossible_settings_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        BreakerSettings.model_validate(changed)


class Model:
    """The same rules said naively, from whole lists: what the breaker is compared with."""

    def __init__(self) -> None:
        self.state, self.now, self.until, self.openings, self.permits = "closed", 0.0, 0.0, 0, 0
        self.results: list[tuple[float, bool]] = []

    def step(self, word: str) -> bool:
        """Whether a call was admitted."""
        if word == "wait":
            self.now += 7
            return False
        if self.state == "open":
            if self.now < self.until:
                return False
            self.state, self.results, self.permits = "half_open", [], 2
        if self.state == "half_open" and self.permits == 0:
            return False
        if word == "cancel":
            return True
        self.permits -= self.state == "half_open"
        self.results.append((self.now, word == "fail"))
        seen = [failed for at, failed in self.results[-5:] if self.state == "half_open" or at > self.now - 20]
        if len(seen) >= (2 if self.state == "half_open" else 3):
            if sum(seen) / len(seen) >= 0.5:
                self.until = self.now + min(60, 10 * 2**self.openings)
                self.state, self.results, self.openings = "open", [], self.openings + 1
            elif self.state == "half_open":
                self.state, self.results, self.openings = "closed", [], 0
        return True


@given(lists(sampled_from(["ok", "fail", "cancel", "wait"]), max_size=120))
def test_it_behaves_as_the_rules_said_naively(words: list[str]) -> None:
    clock, model = FakeClock(), Model()
    breaker = a_breaker(clock, window=5, window_s=20, minimum_calls=3, half_open_permits=2)
    for word in words:
        admitted = model.step(word)
        if word == "wait":
            clock.advance(7)
            continue
        permit = breaker.try_acquire()
        assert (permit is not None) == admitted
        if permit:
            {"ok": permit.succeed, "fail": permit.fail, "cancel": permit.release}[word]()
        assert breaker.state.value == model.state
