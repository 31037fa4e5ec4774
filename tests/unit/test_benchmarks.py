"""What the benchmark makes of its measurements."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.__main__ import SECTIONS, names_of
from benchmarks.bench import at_least, at_most, table, verdict
from benchmarks.generator import Decided, backlog
from benchmarks.load import Measured, median
from benchmarks.machine import share_out
from benchmarks.promotion import estimates_right
from benchmarks.recovery import back_after_s
from lab.traffic import OK, Answer, Record


def test_a_target_is_met_at_its_limit_and_missed_beyond() -> None:
    assert [at_most("x", value, "ms", 2).met for value in (1, 2, 2.1)] == [True, True, False]
    assert [at_least("x", value, "ms", 2).met for value in (1.9, 2, 3)] == [False, True, True]


def test_a_missed_target_stands_out_in_the_verdict() -> None:
    printed = verdict([at_most("slow", 1234.5, "ms", 250), at_least("fast", 0.951, "ratio", 0.95)])
    assert "| slow | 1,234 | ms    | <= 250  | **no** |" in printed
    assert "| fast | 0.951 | ratio | >= 0.95 | yes    |" in printed


def test_a_table_is_markdown() -> None:
    assert table(("a", "b"), [("x", 12)]).splitlines() == ["| a | b  |", "|---|----|", "| x | 12 |"]


def test_the_generator_has_a_core_to_itself_where_there_are_two() -> None:
    assert share_out([0, 1]).apart
    assert share_out([0, 1, 2, 3]).services == {0, 1, 2}
    assert not share_out([0]).apart


def test_backlog_counts_what_is_stored_and_not_decided() -> None:
    at_s, counts = backlog({"a": Decided(100.0, 103.0), "b": Decided(100.2, 100.4), "c": Decided(101.0, 102.0)}, 1.0)
    assert dict(zip(at_s, counts, strict=True)) == {0.0: 0, 1.0: 1, 2.0: 2, 3.0: 1, 4.0: 0}


def acknowledged(name: str, estimate_at: float | None) -> Record:
    return Record(0.0, "bulk", 0.0, 0.1, Answer(OK, name, estimate_at))


def test_an_estimate_is_right_within_a_quarter_of_the_wait_or_a_second() -> None:
    decided = {"long": Decided(0, 100), "short": Decided(0, 0.1)}
    judged = {
        estimate_at: estimates_right([acknowledged(name, estimate_at)], decided)
        for name, estimate_at in (("long", 75.0), ("long", 74.0), ("long", 126.0), ("short", 1.0), ("short", 1.2))
    }
    assert judged == {75.0: 1.0, 74.0: 0.0, 126.0: 0.0, 1.0: 1.0, 1.2: 0.0}


def test_goodput_is_back_only_when_it_stays() -> None:
    shares = [1.0, 1.0, 0.2, 0.1, 0.97, 0.5, 0.96, 1.0]
    assert back_after_s(shares, end_s=3) == 3
    assert back_after_s([1.0] * 8, end_s=3) == 0
    assert back_after_s([1.0] * 7 + [0.5], end_s=3) == float("inf"), "nobody saw it come back"


def test_the_median_round_counts() -> None:
    rounds = [Measured(count, 1.0) for count in (30, 10, 20)]
    assert median(rounds).a_second == 20


def test_sections_run_in_our_order_and_unknown_ones_are_named() -> None:
    first, second = list(SECTIONS)[:2]
    assert names_of(f"{second},{first}") == [first, second]
    with pytest.raises(argparse.ArgumentTypeError, match="no section nonsense"):
        names_of("nonsense")
