"""A trace as a tree, and as the lines that a person reads."""

from __future__ import annotations

from loanmesh.cli.trace import waterfall
from loanmesh.runtime import semconv
from loanmesh.seeing.causes import cause_in
from loanmesh.seeing.spans import Log
from loanmesh.seeing.tree import hang_logs, plant, walk
from tests.spans import a_span


def test_children_follow_their_parent_by_time_and_orphans_are_roots() -> None:
    root, late, early = a_span("root"), a_span("late", span_id="02", parent="01", began=1.8), None
    early = a_span("early", span_id="03", parent="01", began=1.2)
    orphan = a_span("orphan", span_id="04", parent="99", began=5.0, ended=6.0)
    names = [(node.span.name, node.depth) for node in walk(plant([orphan, late, early, root]))]
    assert names == [("root", 0), ("early", 1), ("late", 1), ("orphan", 0)]


def test_spans_in_a_ring_are_all_shown_once() -> None:
    ring = [a_span("a", span_id="01", parent="02"), a_span("b", span_id="02", parent="01"), a_span("c", span_id="03")]
    assert sorted(node.span.name for node in walk(plant(ring))) == ["a", "b", "c"]


def test_a_line_hangs_under_the_innermost_span_of_its_process() -> None:
    roots = plant([a_span("outer"), a_span("inner", span_id="02", parent="01", began=1.4, ended=1.6)])
    inside = Log(1.5, "", "intake", "i-1", "warning", "commit_failed")
    elsewhere = Log(1.5, "", "bureau", "b-1", "warning", "breaker_changed")
    assert hang_logs(roots, [inside, elsewhere]) == [elsewhere]
    assert {node.span.name: len(node.logs) for node in walk(roots)} == {"outer": 0, "inner": 1}


def test_the_waterfall_says_what_was_wrong_why_and_what_to_do_next() -> None:
    spans = [
        a_span(application="a1", error="source_missing:court", attributes={semconv.OUTCOME: "deferred"}),
        a_span("ask court", span_id="02", parent="01", service="bureau", error="unavailable", application="a1",
               attributes={semconv.SOURCE: "court"}),
    ]  # fmt: skip
    roots = plant(spans)
    beside = hang_logs(roots, [Log(1.5, "", "bureau", "b-9", "warning", "breaker_changed", {"state": "open"})])
    text = [line.plain for line in waterfall(roots, beside, cause_in(spans, {}), "lenders/demo/applications/a1")]
    assert any("bureau ask court  ✗ unavailable" in line for line in text)
    assert any("breaker_changed state=open" in line for line in text)
    assert text[-2].startswith("cause  source court is down")
    assert text[-1] == "next: `loanmesh deps`"


def test_the_waterfall_says_when_it_is_over() -> None:
    id_ = "01a210fb-2058-7ba2-a5d7-2dd869f02f34"
    spans = [
        a_span(application=id_, error="source_missing:court", attributes={semconv.OUTCOME: "deferred"}),
        a_span("ask court", span_id="02", parent="01", service="bureau", error="unavailable", application=id_,
               attributes={semconv.SOURCE: "court"}),
        a_span(application=id_, span_id="03", began=50.0, ended=51.0, attributes={semconv.OUTCOME: "APPROVED"}),
    ]  # fmt: skip
    name = f"lenders/demo/applications/{id_}"
    text = [line.plain for line in waterfall(plant(spans), [], cause_in(spans, {}), name)]
    assert text[-3].startswith("cause  source court is down")
    assert text[-2].startswith("over   APPROVED at ")
    assert text[-1] == f"next: `loanmesh history {name}` shows its events"
