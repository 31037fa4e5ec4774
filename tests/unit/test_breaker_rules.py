"""The breaker against resilience4j's rule table, and against the promises made of it: never falsely, never flooding."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from loanmesh.runtime.breaker import Breaker, BreakerSettings, State
from loanmesh.runtime.clock import FakeClock

SEED = 20261124


def a_breaker(clock: FakeClock | None = None, **settings: Any) -> Breaker:
    return Breaker(BreakerSettings(**settings), clock or FakeClock(), random.Random(SEED))


def play(breaker: Breaker, clock: FakeClock, script: str) -> str:
    """Plays a script and returns the state it ends in, or `refused`.

    o: a call that succeeds  x: that fails  s: that is slow and succeeds  S: slow and fails  c: cancelled  .: 10 s pass
    """
    for letter in script.replace(" ", ""):
        if letter == ".":
            clock.advance(10)
            continue
        permit = breaker.try_acquire()
        if permit is None:
            return "refused"
        if letter in "sS":
            clock.advance(2)
        {"o": permit.succeed, "s": permit.succeed, "x": permit.fail, "S": permit.fail, "c": permit.release}[letter]()
    return breaker.state.value


# resilience4j 2's documented rules for a count-based window, a row each; rates are percentages there, shares here.
@pytest.mark.parametrize(
    ("rule", "script", "ends"),
    [
        ("no rate before the minimum number of calls", "xxx", "closed"),
        ("opens when the failure rate equals the threshold", "xxoo", "open"),
        ("stays closed below the threshold", "xooo oooo", "closed"),
        ("a row of failures is nothing special", "ooo oooo xxx", "closed"),
        ("the window slides: old results leave it", "xooo oooo ooo xxx", "closed"),
        ("opens within one window of failing half the time", "oooooooo oxoxoxox", "open"),
        ("opens on slow calls though all succeed", "ssss", "open"),
        ("slow calls below the threshold do no harm", "sooo oooo oo", "closed"),
        ("a slow failure counts for both rates, once each", "Soo S", "open"),
        ("ignored calls do not count", "cccc cccc xxc cc", "closed"),
        ("open refuses", "xxxx o", "refused"),
        ("open does not change by time alone", "xxxx .", "open"),
        ("the first call after the wait finds it half open", "xxxx . o", "half_open"),
        ("half-open closes when its permitted calls succeed", "xxxx . oo", "closed"),
        ("half-open opens when its permitted calls fail", "xxxx . xx", "open"),
        ("half-open opens at the threshold too", "xxxx . xo", "open"),
        ("half-open opens on slow probes", "xxxx . ss", "open"),
        ("half-open decides on all its permits, not on the first", "xxxx . x", "half_open"),
        ("an ignored probe gives its permit back", "xxxx . cccccccc oo", "closed"),
        ("closing begins a new window", "xxxx . oo xxx", "closed"),
        ("opening again refuses again", "xxxx . xx o", "refused"),
    ],
)
def test_the_rule_table(rule: str, script: str, ends: str) -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, window=8, minimum_calls=4, failure_rate=0.5, slow_call_s=2, slow_rate=0.5, open_s=10,
                        open_s_max=10, jitter=0, half_open_permits=2)  # fmt: skip
    assert play(breaker, clock, script) == ends, rule


@pytest.mark.parametrize("trouble", ["failing", "slow"])
def test_half_of_all_calls_in_trouble_opens_it_within_one_window(trouble: str) -> None:
    for seed in range(100):
        clock, dice = FakeClock(), random.Random(seed)
        breaker = a_breaker(clock, slow_rate=0.5)
        play(breaker, clock, "o" * 50)
        calls = 0
        for calls in range(1, 51):
            # Exactly half, in random order: pairs of one good and one bad.
            if calls % 2:
                bad_first = dice.random() < 0.5
            is_bad = bad_first == bool(calls % 2)
            permit = breaker.try_acquire()
            assert permit
            if is_bad and trouble == "slow":
                clock.advance(3)
            if is_bad and trouble == "failing":
                permit.fail()
            else:
                permit.succeed()
            if breaker.state is State.OPEN:
                break
        assert breaker.state is State.OPEN, f"seed {seed}"
        assert calls <= 50


def test_five_percent_failures_never_open_it_in_a_million_calls() -> None:
    dice = random.Random(SEED)
    breaker = a_breaker()
    failed = 0
    for _ in range(1_000_000):
        permit = breaker.try_acquire()
        assert permit, f"opened falsely: {breaker.cause}"
        if dice.random() < 0.05:
            failed += 1
            permit.fail()
        else:
            permit.succeed()
    assert 49_000 < failed < 51_000
    assert breaker.changes.total() == 0


def test_a_dead_dependency_gets_next_to_nothing() -> None:
    """A hundred calls wanted each second for ten minutes: at most 1.5 % of them arrive."""
    clock = FakeClock()
    breaker = a_breaker(clock)
    arrived = wanted = 0
    for _ in range(600 * 100):
        clock.advance(0.01)
        wanted += 1
        if permit := breaker.try_acquire():
            arrived += 1
            permit.fail()
    assert arrived / wanted <= 0.015
    assert arrived >= 3 * 100  # And it goes on being looked at: some probes each opening of about 5 s.


def test_half_open_never_admits_more_than_its_permits_at_a_time() -> None:
    """Calls end in any order, with any outcome, some never: under way in half-open are never more than the permits."""
    dice = random.Random(SEED)
    clock = FakeClock()
    breaker = a_breaker(clock, half_open_permits=4, minimum_calls=4, open_s=1, open_s_max=2)
    play(breaker, clock, "xxxx")
    under_way: list[Any] = []
    for _ in range(20_000):
        clock.advance(0.01)
        before = breaker.changes[State.HALF_OPEN]
        permit = breaker.try_acquire()
        if breaker.changes[State.HALF_OPEN] != before:
            under_way = []  # Those of an earlier term have no say and no permit any more.
        if permit and breaker.state is State.HALF_OPEN:
            under_way.append(permit)
        elif permit:
            permit.fail()  # Closed again: so that it opens again.
        assert len(under_way) <= 4
        if under_way and dice.random() < 0.3:
            one = under_way.pop(dice.randrange(len(under_way)))
            dice.choice([one.succeed, one.fail, one.fail, one.release])()
        if breaker.state is not State.HALF_OPEN:
            under_way = []
    assert breaker.changes[State.HALF_OPEN] > 50


def test_probes_that_never_end_do_not_shut_a_dependency_out_for_good() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, minimum_calls=1, open_s=10, jitter=0, half_open_permits=1, half_open_s_max=30)
    play(breaker, clock, "x.")
    lost = breaker.try_acquire()
    clock.advance(29)
    assert breaker.try_acquire() is None
    assert breaker.state is State.HALF_OPEN
    clock.advance(1)
    assert breaker.try_acquire() is None
    assert (breaker.state, breaker.cause) == (State.OPEN, "probes did not end within 30 s")
    clock.advance(20)
    assert lost
    lost.fail()  # Too late to have a say.
    assert play(breaker, clock, "o") == "closed"


def test_what_was_long_ago_does_not_count() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, window=10, minimum_calls=4, window_s=60)
    play(breaker, clock, "oxx")
    clock.advance(60)
    assert play(breaker, clock, "oxo") == "closed"  # Three of six failed, but only one of these three.
    assert play(breaker, clock, "x") == "open"


def test_a_person_pauses_a_dependency_and_gives_it_back() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, minimum_calls=2)
    breaker.force(State.FORCED_OPEN, "paused")
    clock.advance(3600)
    assert breaker.try_acquire() is None
    assert breaker.retry_in_s == 5.0
    breaker.force(State.CLOSED, "back")
    assert play(breaker, clock, "oo") == "closed"
    assert [change.cause for change in breaker.history] == ["paused", "back"]


def test_forced_closed_lets_everything_pass_and_counts_nothing() -> None:
    clock = FakeClock()
    breaker = a_breaker(clock, minimum_calls=2)
    breaker.force(State.FORCED_CLOSED, "trust me")
    assert play(breaker, clock, "x" * 100) == "forced_closed"
    breaker.force(State.CLOSED, "back")
    assert play(breaker, clock, "x") == "closed"
    with pytest.raises(ValueError, match="half_open"):
        breaker.force(State.HALF_OPEN, "no")


def test_a_call_is_cheap() -> None:
    """Prints what a guarded call costs; a figure to look at, no promise: other tests may run beside it."""
    clock = FakeClock()
    breaker = a_breaker(clock)
    started = time.process_time()
    for _ in range(100_000):
        permit = breaker.try_acquire()
        assert permit
        permit.succeed()
    print(f"breaker: {(time.process_time() - started) * 10:.2f} us a call")
    assert breaker.state is State.CLOSED
