"""The pace: found by touching a quota, kept near it, and given up when the quota is."""

from __future__ import annotations

from services.intake.pace import Pace


def run(pace: Pace, start: float, seconds: float, quota_a_second: float) -> tuple[int, int, float]:
    """Begin as many as allowed, 64 at most at once, against a quota: (answered, turned away, time of the end)."""
    now, tokens, answered, away = start, quota_a_second / 10, 0, 0
    while now < start + seconds:
        tokens = min(quota_a_second / 10, tokens + quota_a_second * 0.01)
        size = pace.allowance(now, 64)
        pace.begun(size)
        good = min(size, int(tokens))
        tokens -= good
        answered, away = answered + good, away + size - good
        began, now = now, now + 0.01
        if size:
            pace.ended(good, size - good, began, now)
    return answered, away, now


def test_without_overload_there_is_no_limit() -> None:
    pace = Pace()
    answered, away, _ = run(pace, 0.0, 5.0, 1e9)
    assert answered >= 499 * 64
    assert away == 0
    assert pace.a_second is None


def test_a_quota_is_used_nearly_in_full_and_seldom_exceeded() -> None:
    pace = Pace()
    _, _, now = run(pace, 0.0, 3.0, 50.0)
    answered, away, _ = run(pace, now, 60.0, 50.0)
    assert answered >= 0.85 * 50 * 60
    assert away <= 0.25 * answered


def test_a_source_that_turns_everything_away_is_hardly_asked() -> None:
    pace = Pace()
    _, _, now = run(pace, 0.0, 3.0, 0.0)
    _, away, _ = run(pace, now, 30.0, 0.0)
    assert away <= 60


def test_when_the_quota_is_gone_full_speed_is_back_within_seconds() -> None:
    pace = Pace()
    _, _, now = run(pace, 0.0, 20.0, 50.0)
    _, _, now = run(pace, now, 5.0, 1e9)
    answered, _, _ = run(pace, now, 1.0, 1e9)
    assert answered >= 1000
